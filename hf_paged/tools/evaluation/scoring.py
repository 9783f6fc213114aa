"""A batch of windows, run through several caches side by side."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from hf_paged._transformers import CACHE
from hf_paged.tools.evaluation.windows import Window
from hf_paged.tools.lab.baseline import Baseline, synchronize
from hf_paged.tools.lab.memory import kv_bytes
from hf_paged.tools.lab.model import padded

_BLOCK = 32  # tokens compared at once: in float64, a block over 49,152 words is 12 MiB


@dataclass
class Score:
    """What one cache made of a batch of windows.

    Attributes:
        nll: of each window, the sum over its scored tokens, nats.
        squared_difference: of the NLL from the reference's, squared, the sum over the scored tokens of the batch.
        kl: from the reference, the sum over the scored tokens of the batch, nats.
        max_logit_difference: from the reference, the largest over the vocabulary and the scored tokens.
        num_agreeing: scored tokens for which the reference finds the same token the likeliest.
        seconds: of the forward passes.
        kv_bytes: keys and values held, at most.
    """

    nll: list[float]
    squared_difference: float = 0.0
    kl: float = 0.0
    max_logit_difference: float = 0.0
    num_agreeing: int = 0
    seconds: float = 0.0
    kv_bytes: int = 0

    def add(self, rows: Tensor, targets: Tensor, logits: Tensor, reference: Tensor) -> None:
        """Count tokens in.

        Args:
            rows: `(num_tokens,)` the window of each scored token.
            targets: `(num_tokens,)` what the tokens are.
            logits: `(num_tokens, vocab_size)`.
            reference: the same of the reference.
        """
        # The divergence of logits that differ in their last bits is far below what float32 resolves.
        own, other = logits.double(), reference.double()
        nll, expected = (cross_entropy(each, targets, reduction="none") for each in (own, other))
        for row, value in zip(rows.tolist(), nll.tolist(), strict=True):
            self.nll[row] += value
        self.squared_difference += (nll - expected).square().sum().item()
        self.kl += kl_div(own.log_softmax(-1), other.log_softmax(-1), reduction="sum", log_target=True).item()
        self.max_logit_difference = max(self.max_logit_difference, (own - other).abs().max().item())
        self.num_agreeing += int((logits.argmax(-1) == reference.argmax(-1)).sum())


class _Batch:
    """Windows as rows, padded on the right: tokens, mask, and the token that follows each.

    Args:
        windows: one for each row.
        device: of the tensors.
    """

    def __init__(self, windows: Sequence[Window], device: torch.device) -> None:
        self.ids, self.mask = padded([window.token_ids[:-1] for window in windows], device, side="right")
        self.targets, _ = padded([window.token_ids[1:] for window in windows], device, side="right")
        self.num_columns = self.ids.shape[1]
        self.positions = torch.arange(self.num_columns, device=device).expand_as(self.ids)
        starts = torch.tensor([window.first_scored - 1 for window in windows], device=device)
        self.is_scored = self.mask.bool() & (self.positions >= starts[:, None])

    def run(self, baseline: Baseline, cache: Any, columns: slice, score: Score) -> Tensor:
        """Run some columns; return their logits, `(num_rows, num_columns, vocab_size)`."""
        synchronize(self.ids.device)
        began = time.perf_counter()
        logits: Tensor = baseline.model(
            self.ids[:, columns],
            attention_mask=self.mask[:, : columns.stop],
            position_ids=self.positions[:, columns],
            **{CACHE: cache},
        ).logits
        synchronize(self.ids.device)
        score.seconds += time.perf_counter() - began
        score.kv_bytes = max(score.kv_bytes, kv_bytes(cache))
        return logits


@torch.no_grad()
def score(baselines: Sequence[Baseline], windows: Sequence[Window], chunk_size: int) -> dict[str, Score]:
    """Run windows through a new cache of each baseline, chunk after chunk, and compare.

    The baselines take turns chunk by chunk, and the logits of one chunk are held at a time.

    Args:
        baselines: the first is the reference.
        windows: the rows of the batch.
        chunk_size: columns that are run at a time.
    """
    batch = _Batch(windows, baselines[0].model.device)
    caches = [baseline.new_cache(batch.num_columns) for baseline in baselines]
    scores = [Score([0.0] * len(windows)) for _ in baselines]

    def run_chunk(columns: slice, first: int) -> None:
        """Run some columns, beginning with one of the baselines; a function, so that the logits end with it."""
        order = [*range(first, len(baselines)), *range(first)]
        logits = {index: batch.run(baselines[index], caches[index], columns, scores[index]) for index in order}
        scored = batch.is_scored[:, columns].nonzero()
        for block in range(0, len(scored), _BLOCK):
            rows, new = scored[block : block + _BLOCK].unbind(1)
            targets, reference = batch.targets[:, columns][rows, new], logits[0][rows, new]
            for index, own in enumerate(scores):
                own.add(rows, targets, logits[index][rows, new], reference)

    for index, start in enumerate(range(0, batch.num_columns, chunk_size)):
        run_chunk(slice(start, min(start + chunk_size, batch.num_columns)), index % len(baselines))
    return {baseline.name: own for baseline, own in zip(baselines, scores, strict=True)}
