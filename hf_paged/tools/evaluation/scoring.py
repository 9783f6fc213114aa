"""A batch of windows, run through several caches side by side."""

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_paged._transformers import CACHE
from hf_paged.tools.evaluation.record import Score
from hf_paged.tools.evaluation.windows import Window
from hf_paged.tools.lab.candidate import Candidate
from hf_paged.tools.lab.memory import kv_bytes

_BLOCK = 32  # tokens compared at once: in float64, a block over 49,152 words is 12 MiB


class _Inputs:
    """Windows as rows, padded on the right.

    Args:
        windows: one for each row.
        device: of the tensors.
    """

    def __init__(self, windows: Sequence[Window], device: torch.device) -> None:
        self.num_columns = max(window.num_inputs for window in windows)
        shape = len(windows), self.num_columns
        ids, mask, targets = torch.zeros((3, *shape), dtype=torch.long)
        self.is_scored = torch.zeros(shape, dtype=torch.bool)  # on the CPU, where rows and columns are looked up
        for row, window in enumerate(windows):
            token_ids = torch.tensor(window.token_ids)
            ids[row, : window.num_inputs] = token_ids[:-1]
            targets[row, : window.num_inputs] = token_ids[1:]
            mask[row, : window.num_inputs] = 1
            self.is_scored[row, window.first_scored - 1 : window.num_inputs] = True
        self.ids, self.mask, self.targets = ids.to(device), mask.to(device), targets.to(device)
        self.positions = torch.arange(self.num_columns, device=device).expand(shape)


class _Lane:
    """One candidate's way through a batch.

    Args:
        candidate: whose cache it is.
        inputs: of the batch.
    """

    def __init__(self, candidate: Candidate, inputs: _Inputs) -> None:
        self._model = candidate.model
        self._cache = candidate.new_cache(inputs.num_columns)
        self._inputs = inputs
        self._nll: list[list[float]] = [[] for _ in inputs.ids]
        self._squared_differences: list[float] = []
        self._kl: list[float] = []
        self._max_logit_difference = 0.0
        self._num_agreeing = 0
        self._seconds: list[float] = []
        self._kv_bytes = 0

    def feed(self, columns: slice) -> Tensor:
        """Run some columns; return their logits, `(num_rows, num_columns, vocab_size)`."""
        inputs = self._inputs
        device = inputs.ids.device
        _synchronize(device)
        began = time.perf_counter()
        logits: Tensor = self._model(
            inputs.ids[:, columns],
            attention_mask=inputs.mask[:, : columns.stop],
            position_ids=inputs.positions[:, columns],
            **{CACHE: self._cache},
        ).logits
        _synchronize(device)
        self._seconds.append(time.perf_counter() - began)
        self._kv_bytes = max(self._kv_bytes, kv_bytes(self._cache))
        return logits

    def note(self, rows: Sequence[int], targets: Tensor, logits: Tensor, reference: Tensor) -> None:
        """Compare logits with those of the reference.

        Args:
            rows: of each scored token.
            targets: `(len(rows),)` what the tokens are.
            logits: `(len(rows), vocab_size)`.
            reference: the same of the reference.
        """
        # The divergence of logits that differ in their last bits is far below what float32 resolves.
        own, other = logits.double(), reference.double()
        log_probabilities, expected = own.log_softmax(-1), other.log_softmax(-1)
        nll, other_nll = (-each.gather(1, targets[:, None])[:, 0] for each in (log_probabilities, expected))
        for row, value in zip(rows, nll.tolist(), strict=True):
            self._nll[row].append(value)
        self._squared_differences += (nll - other_nll).square().tolist()
        self._kl += (expected.exp() * (expected - log_probabilities)).sum(-1).tolist()
        self._max_logit_difference = max(self._max_logit_difference, (own - other).abs().max().item())
        self._num_agreeing += int((logits.argmax(-1) == reference.argmax(-1)).sum())

    def score(self) -> Score:
        """What came out."""
        return Score(
            nll=[math.fsum(row) for row in self._nll],
            squared_difference=math.fsum(self._squared_differences),
            kl=math.fsum(self._kl),
            max_logit_difference=self._max_logit_difference,
            num_agreeing=self._num_agreeing,
            seconds=math.fsum(self._seconds),
            kv_bytes=self._kv_bytes,
        )


@torch.no_grad()
def score(candidates: Sequence[Candidate], windows: Sequence[Window], chunk_size: int) -> dict[str, Score]:
    """Run windows through a new cache of each candidate, chunk after chunk, and compare.

    The candidates take turns chunk by chunk, and the logits of one chunk are held at a time.

    Args:
        candidates: the first is the reference.
        windows: the rows of the batch.
        chunk_size: columns that are run at a time.
    """
    inputs = _Inputs(windows, candidates[0].model.device)
    lanes = [_Lane(candidate, inputs) for candidate in candidates]
    for index, start in enumerate(range(0, inputs.num_columns, chunk_size)):
        _run_chunk(lanes, inputs, slice(start, min(start + chunk_size, inputs.num_columns)), index % len(lanes))
    return {candidate.name: lane.score() for candidate, lane in zip(candidates, lanes, strict=True)}


def _run_chunk(lanes: Sequence[_Lane], inputs: _Inputs, columns: slice, first: int) -> None:
    """Run some columns through all lanes, beginning with `first`; a function, so that the logits end with it."""
    order = [*range(first, len(lanes)), *range(first)]
    logits = {index: lanes[index].feed(columns) for index in order}
    scored = inputs.is_scored[:, columns].nonzero()
    for block in range(0, len(scored), _BLOCK):
        rows, new = scored[block : block + _BLOCK].unbind(1)
        targets = inputs.targets[:, columns][rows, new]
        reference = logits[0][rows, new]
        for index, lane in enumerate(lanes):
            lane.note(rows.tolist(), targets, logits[index][rows, new], reference)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
