"""Which rows have ended."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hf_paged.decoding.stopping import ActingCriterion, waits_for_values
from hf_paged.decoding.transfer import Transfer


class Ends:
    """Which rows have ended, and the streamer that is told of their tokens.

    Criteria that compute with tensors are asked at once. Others, as those of one's own, may look at values, for which
    the host would wait until the pass is done that was launched meanwhile. They are asked on a stream beside it, where
    there is nothing to wait for but the tokens.

    Args:
        criteria: what ends rows.
        streamer: is given the tokens; None for nobody.
        input_ids: `(num_rows, num_columns)`, the prompt.
        pad_token: what rows go on with that have ended; None without.
        is_late: whether a pass is launched between `ask` and `are_reached`.

    Attributes:
        max_length: columns at which all rows end, which is known without asking.
    """

    def __init__(
        self,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        input_ids: Tensor,
        pad_token: Tensor | None,
        is_late: bool,
    ) -> None:
        self.max_length: float = min((one.max_length for one in criteria if _is_mere_length(one)), default=math.inf)
        self._streamer: Any = streamer
        self._pad_token = None if pad_token is None else pad_token.to(input_ids.device)
        self._pads = any(hasattr(one, "eos_token_id") for one in criteria)
        asked = [one for one in criteria if not _is_mere_length(one)]
        self._late = [one for one in asked if is_late and waits_for_values(one)]
        self._at_once = [one for one in asked if not (is_late and waits_for_values(one))]
        cuda: Any = torch.cuda
        self._beside = cuda.Stream(input_ids.device) if self._late and input_ids.is_cuda else None
        self._ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self._have_ended = [False] * len(input_ids)  # as far as is known
        self._found: list[tuple[ActingCriterion, Tensor]] = []

    def padded(self, tokens: Tensor) -> Tensor:
        """Put padding in the place of the tokens `(num_rows,)` of rows that had ended before."""
        if not self._pads or not any(self._have_ended):
            return tokens
        assert self._pad_token is not None  # as generate() has seen to
        return torch.where(self._ended.bool(), self._pad_token, tokens)

    def ask(self, input_ids: Tensor, scores: Any, tokens: Tensor) -> None:
        """Begin to find out which rows end with these tokens.

        Args:
            input_ids: `(num_rows, num_columns)` with the tokens.
            scores: of all steps, as criteria are given them.
            tokens: `(num_rows,)`.
        """
        self._asked = input_ids, scores, tokens
        self._ask(self._at_once)
        if not self._late:
            self._send()
        elif self._beside is not None:
            self._is_chosen = torch.cuda.current_stream(input_ids.device).record_event()

    def are_reached(self) -> bool:
        """Wait for the answer, whether all rows have ended, and give the streamer its tokens.

        It comes a step late if another pass was launched since `ask`.
        """
        if self._late:
            with self._on_the_stream_beside():
                self._ask(self._late)
                self._send()
        copies = self._transfer.wait()
        found, self._found = self._found, []
        for criterion, _ in found:
            rows = [row for row, is_found in enumerate(copies.pop(0).tolist()) if is_found]
            if rows:
                criterion.act(rows, len(self._have_ended))
        self._have_ended = copies.pop(0).tolist()
        if self._streamer is not None:
            self._streamer.put(copies.pop(0))
        return all(self._have_ended)

    def _ask(self, criteria: list[StoppingCriteria]) -> None:
        input_ids, scores, _ = self._asked
        for criterion in criteria:
            if isinstance(criterion, ActingCriterion):
                self._found.append((criterion, criterion.find(input_ids, scores)))
            else:
                self._ended = self._ended | criterion(input_ids, scores)

    def _send(self) -> None:
        tokens = [] if self._streamer is None else [self._asked[2]]
        self._transfer = Transfer([*(mask for _, mask in self._found), self._ended, *tokens])

    @contextmanager
    def _on_the_stream_beside(self) -> Iterator[None]:
        if self._beside is None:
            yield
            return
        main = torch.cuda.current_stream(self._beside.device)
        self._beside.wait_event(self._is_chosen)
        try:
            with torch.cuda.stream(self._beside):
                yield
        finally:
            main.wait_stream(self._beside)
            self._ended.record_stream(main)


def _is_mere_length(criterion: StoppingCriteria) -> bool:
    """Whether it is known without asking when a criterion ends all rows, and it has no more to say."""
    if type(criterion) is not MaxLengthCriteria:
        return False
    # Beyond the positions that the model knows, it warns.
    num_positions = criterion.max_position_embeddings
    return num_positions is None or criterion.max_length <= num_positions
