"""Which tokens a cache is known to hold.

Transformers hands a cache keys, values and lengths, never the ids that they belong to. So nobody notices that a cache
holds another prompt than the one that `generate()` is given, and the answer is wrong. But `generate()` marks a cache
that it was given (`_is_user_defined`) once per call, when its inputs are ready and nothing is computed yet, and asks
it for mask sizes before every pass. From there the ids are local variables of its functions, further up in the stack:
reading them patches nothing, and needs nothing from the caller. Where another function makes the passes, or has no
ids, they are unknown, and nothing is checked.
"""

import sys
from collections.abc import Iterator, Sequence
from threading import get_ident
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.generation import utils as generation

from hf_paged.batch.padding import Columns
from hf_paged.batch.prompt.offsets import Offsets
from hf_paged.batch.steps.progress import another_thread
from hf_paged.batch.told import ToldPass

_GLOBALS = vars(generation)  # by which its functions are told from others of the same name

# Functions of Transformers that make a pass, and what they call the ids of all columns up to its end.
_SEQUENCES = {
    "_prefill": "input_ids",
    "_sample": "input_ids",
    "_beam_search": "flat_running_sequences",
    "_assisted_decoding": "candidate_input_ids",
}


class _Mark:
    """Where a `generate()` was given the cache.

    Args:
        count: columns that there were.

    Attributes:
        thread: that generates.
        is_disturbed: whether another thread has begun a pass since.
    """

    def __init__(self, count: int) -> None:
        self.thread = get_ident()
        self.count = count
        self.is_disturbed = False


class KnownIds:
    """The ids of consecutive columns of a cache, as they were given when the columns were computed.

    Attributes:
        offsets: of the positions behind their images, which the model keeps.
    """

    def __init__(self) -> None:
        self.offsets = Offsets()
        self._ids: Tensor | None = None  # `(any, at least _end)`
        self._rows: list[int] | None = None  # for each row of the cache, which of `_ids` it is; None: the same
        self._first, self._end = 0, 0  # columns that are known
        self._pass: tuple[Tensor, int, int] | None = None  # what the pass under way will make known
        self._mark: _Mark | None = None  # of the generate() that was the last one to be given the cache
        self._generating: int | None = None  # the thread whose generate() was the last one to make a pass
        self._passing: int | None = None  # the thread that began the last pass

    def fork(self) -> "KnownIds":
        """Return a record of its own that says the same."""
        fork = KnownIds()
        fork._ids, fork._rows, fork._first, fork._end = self._ids, self._rows, self._first, self._end
        fork.offsets = self.offsets.fork()
        return fork

    @property
    def known(self) -> tuple[Tensor, int] | None:
        """The ids that are known, `(num_rows, num_known)` or one row for all, and their first column; None without."""
        if self._ids is None:
            return None
        ids = self._ids if self._rows is None else self._ids[self._rows]
        return ids[:, self._first : self._end], self._first

    def are_all(self, count: int) -> bool:
        """Whether the first `count` columns are known."""
        return count == 0 or (self._ids is not None and self._first == 0 and self._end >= count)

    def note(self, ids: Tensor, begin: int, end: int) -> None:
        """Take note of a pass that was made.

        Args:
            ids: `(num_rows, at least end)`, of all columns; not to be changed any more.
            begin: columns before the pass.
            end: columns after it.
        """
        self._first = self._first if self._ids is not None and self._end == begin else begin
        self._ids, self._rows, self._end = ids, None, end

    def begin_pass(self, sequences: object, begin: int, num_new: int, told: ToldPass | None) -> None:
        """Look for the ids of the pass that begins now.

        Args:
            sequences: the rows of the cache.
            begin: columns before the pass.
            num_new: new columns.
            told: what the loop has said that makes it; None if it says nothing.

        Raises:
            UnclearPassError: if it is a pass of a `generate()` of one thread, and another one has begun to generate.
            ValueError: if the model has positions for another prompt by now.
        """
        end, self._pass = begin + num_new, None
        thread, mark = get_ident(), self._mark
        if mark is not None and mark.thread != thread:
            mark.is_disturbed = True
        passed, self._passing = self._passing, thread
        is_handed_on = passed not in (None, thread)
        if begin:
            self.offsets.check()
        else:
            self.offsets.forget()
        if told is not None:
            self._check_thread()
            if told.ids.shape[1] == end:
                self._pass = told.ids, begin, end
            return
        for frame in _frames():
            name = _SEQUENCES.get(frame.f_code.co_name)
            if name is None or frame.f_globals is not _GLOBALS:
                continue
            local = frame.f_locals
            if not _is_given(sequences, local.get("model_kwargs")):
                return
            self._check_thread(begin if is_handed_on else None)
            ids, is_prompt = local.get(name), frame.f_code.co_name == "_prefill"
            if not isinstance(ids, Tensor) or ids.ndim != 2:
                return
            if is_prompt and (local["model_kwargs"].get("inputs_embeds") is not None or ids.shape[1] < end):
                return
            if is_prompt:  # in chunks, maybe; and they are the caller's, who may change them
                self._pass = ids.clone(), begin, end
            elif ids.shape[1] == end:
                self._pass = ids, begin, end
            return

    def _check_thread(self, begin: int | None = None) -> None:
        """Let the thread generate that calls this, if it has begun to, or nobody else has since.

        Args:
            begin: columns before its pass, where the pass before it was another thread's.
        """
        thread, mark = get_ident(), self._mark
        if mark is not None and thread == mark.thread:
            if mark.is_disturbed or begin not in (None, mark.count):
                raise another_thread()
            self._mark, self._generating = None, thread
        elif self._generating not in (None, thread):
            raise another_thread()

    def end_pass(self) -> None:
        """Take note that the pass under way was made."""
        self.offsets.note()
        if self._pass is not None:
            self.note(*self._pass)
            self._pass = None

    def roll_back(self) -> None:
        """Take note that the pass under way failed."""
        self._pass = None

    def select(self, indices: Sequence[int]) -> None:
        """Let row `i` be what row `indices[i]` was."""
        self.offsets.select(indices)
        if self._ids is not None:
            self._rows = [index if self._rows is None else self._rows[index] for index in indices]

    def truncate(self, count: int) -> None:
        """Keep the first `count` columns."""
        self._end = min(self._end, count)
        if self._end <= self._first:
            self._ids = None

    def without_first(self, count: int) -> None:
        """Let the first `count` columns be no more."""
        if self._ids is not None:
            self._ids = self._ids[:, count:]
        self._first, self._end = max(0, self._first - count), self._end - count
        if self._end <= self._first:
            self._ids = None

    def join(self, parts: Sequence[tuple["KnownIds", Columns, int]]) -> None:
        """Know what is known of all of several batches, one below the other, the shorter ones padded on the left.

        Args:
            parts: for each what is known of it, its columns, and its number of rows.
        """
        self.offsets.join((known.offsets, num_rows) for known, _, num_rows in parts)
        count = max(columns.count for _, columns, _ in parts)
        first, tensors = 0, []
        for known, columns, num_rows in parts:
            if known.known is None or known._end < columns.count:
                return
            ids, begin = known.known
            padding = count - columns.count + begin
            first = max(first, padding if begin else 0)
            tensors.append(pad(ids.expand(num_rows, -1), (padding, 0)))
        device = tensors[0].device
        self.note(torch.cat([tensor.to(device) for tensor in tensors]), first, count)

    def check(self, columns: Columns) -> tuple[Any, Any, dict[str, Any]] | None:
        """Compare what is known with what `generate()` is about to go on from, which is further up in the stack.

        Args:
            columns: of the cache.

        Returns:
            The model that generates, the ids, and its other inputs; None if nobody generates.

        Raises:
            ValueError: if a token is another one, if the prompt would be computed once more behind the cached one, or
                if the layers of the model won't be given the cache.
        """
        call = next((frame for frame in _frames() if _is_generate(frame)), None)
        if call is None:
            return None
        self._mark = _Mark(columns.count)
        _check_checkpointing(call.f_locals.get("self"))
        local = call.f_locals
        ids, config = local.get("input_ids"), local.get("generation_config")
        inputs: dict[str, Any] = local.get("model_kwargs") or {}
        self.offsets.watch(call.f_locals["self"])
        kinds = inputs.get("mm_token_type_ids")
        if isinstance(kinds, Tensor) and bool(kinds[:, columns.count :].any()):
            self.offsets.forget()  # the model makes them of all images anew
        if columns.count and isinstance(ids, Tensor) and ids.ndim == 2 and inputs.get("inputs_embeds") is None:
            self._check_prompt(ids, inputs.get("attention_mask"), config, local.get("decoding_method"), columns)
        return local.get("self"), ids, inputs

    def _check_prompt(
        self, ids: Tensor, mask: Tensor | None, config: Any, decoding_method: Any, columns: Columns
    ) -> None:
        if getattr(decoding_method, "__name__", None) == "_assisted_decoding":
            raise ValueError(
                f"The cache holds {columns.count} tokens, but generate() computes the whole prompt once more where it "
                "is assisted by a draft. Pass an empty cache (cache.reset() makes it one), or leave out the assistant."
            )
        if is_whole_prompt(ids, mask, config):
            self.compare(ids, mask, columns)

    def compare(self, ids: Tensor, mask: Tensor | None, columns: Columns) -> None:
        """Raise ValueError if a token is known to be another one than in `ids` `(num_rows, at least count)`."""
        end = min(self._end, columns.count, ids.shape[1])
        if self._ids is None or end <= self._first:
            return
        known = self._ids if self._rows is None else self._ids[self._rows]
        if len(known) not in (1, len(ids)):
            return  # which is another mistake
        compared = slice(self._first, end)
        differs = known[:, compared].to(ids.device) != ids[:, compared]
        if columns.real is not None:
            differs = differs & torch.from_numpy(np.ascontiguousarray(columns.real[:, compared])).to(ids.device)
        if mask is not None:
            differs = differs & mask[:, compared].bool().to(ids.device)
        if not bool(differs.any()):
            return
        row, column = (int(index) for index in differs.nonzero()[0])
        common = self._first + int(differs.any(dim=0).nonzero()[0])
        held = int(known[row if len(known) > 1 else 0, self._first + column])
        remedy = f"cache.crop({common - columns.count}) to go on from the {common} columns that both have in common, "
        raise ValueError(
            f"The cache holds another prompt: row {row} has token {held} in column {self._first + column}, but "
            f"input_ids has {int(ids[row, self._first + column])}. Call cache.resume(model, input_ids, "
            "attention_mask) to keep what each row has in common with its prompt and compute the rest. Or use a new "
            f"cache for each prompt; or call {remedy if common else ''}cache.reset() to start over, or cache.fork() "
            "before prompts part."
        )


def is_whole_prompt(ids: Tensor, mask: Tensor | None, config: Any) -> bool:
    """Whether `generate()` takes ids for those of all columns, or else for new ones behind those that are cached.

    Args:
        ids: `(num_rows, num_columns)`.
        mask: `(num_rows, any)`, as it has prepared it; None without padding.
        config: of the call.
    """
    num_masked = getattr(config, "_mask_length", -1) if mask is None else mask.shape[1]
    return bool(num_masked == ids.shape[1])


def _check_checkpointing(model: Any) -> None:
    """Refuse layers from which Transformers takes the cache away, with a warning that says less."""
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            f"generate() was called on a {type(model).__name__} in training mode with gradient checkpointing, where "
            "Transformers takes the cache away from the layers: every token would be computed without those before "
            "it. Call model.eval() before generating, and model.train() after it."
        )


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_generate(frame: FrameType) -> bool:
    return frame.f_code.co_name == "generate" and frame.f_globals is _GLOBALS


def _is_given(sequences: object, inputs: Any) -> bool:
    """Whether a loop of `generate()` uses the cache of these rows, and does not only happen to be under way."""
    if not isinstance(inputs, dict):
        return False
    return any(getattr(inputs.get(name), "_sequences", None) is sequences for name in ("cache", "past_key_values"))
