"""Decoding steps on a GPU, captured once as a CUDA graph and replayed.

A step launches some hundred kernels, and most of them take less time than it takes to launch them. A graph launches
them all at once. It repeats them with the same addresses and sizes: what changes from step to step (token ids,
positions, slots, lists of pages) is copied to where the graph reads it, and where anything else has changed (the pool
has grown, there is another cache) the step is recorded anew.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_paged._torch.tricks import Trick
from hf_paged.attention.metadata import AttentionMetadata
from hf_paged.batch.sequences import Sequences
from hf_paged.batch.steps.step import View
from hf_paged.compile.steady import under_way

logger = logging.getLogger(__name__)

CUDA_GRAPHS = Trick(
    "cuda_graphs",
    "decoding steps on a GPU are captured once and replayed",
    "their kernels are launched one by one",
    device_type="cuda",
)

_MAX_RECORDINGS = 16  # for each compiled graph; what was used least recently is dropped
_MAX_MOVING = 2**16  # elements of what is copied in each step; weights may be integers, too
_PATIENCE = 32  # steps in a row that none before them was like

Inputs = tuple[Any, ...]


class StepGraphs:
    """A compiled forward pass that repeats its decoding steps.

    Args:
        run: the forward pass; takes tensors, numbers and metadata, and returns tensors.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        # Of memory, by stream. Recordings share it, since none runs beside another and what they return is copied.
        self._pools: dict[int, Any] = {}
        self._written: set[int] = set()  # inputs that the pass writes to: they are written where they are
        # Which inputs are tensors of floating-point numbers: weights, as a rule, by far the most; and which are not.
        self._floating: list[int] = []
        self._others: list[int] = []
        self._is_given_up = False
        self._num_unlike = 0

    def __call__(self, *inputs: Any) -> Any:
        """Run the pass, or repeat it."""
        if not self._others:
            for index, value in enumerate(inputs):
                (self._floating if _is_floating(value) else self._others).append(index)
        all_metadata = [inputs[index] for index in self._others if isinstance(inputs[index], AttentionMetadata)]
        if self._is_given_up or not all_metadata or not all(map(_is_repeatable, all_metadata)):
            return self._run(*inputs)
        sequences = all_metadata[0].sequences
        with ExitStack() as stack:
            for group in sequences.pool.groups:
                stack.enter_context(group.staying_in_place())
            moving = {index for index in self._others if _may_move(inputs[index])} - self._written
            key = self._addresses(inputs), _fixed(inputs, self._others, moving, sequences)
            recording = self._recordings.get(key)
            if recording is None or not recording.fits(all_metadata):
                # The first time kernels are compiled, and it shows which lists of pages are read.
                versions = {index: inputs[index]._version for index in moving if not inputs[index].is_inference()}
                outputs = self._run(*inputs)
                written = {index for index, version in versions.items() if inputs[index]._version != version}
                if written:
                    self._written |= written
                else:
                    self._keep(key, _Recording(inputs, moving, all_metadata))
                return outputs
            self._num_unlike = 0
            self._recordings.move_to_end(key)
            recording.send(inputs, all_metadata)
            if not recording.is_done and not self._record(recording, inputs, sequences):
                return self._run(*inputs)
            outputs = recording.replay()
            for layer in recording.layers:
                sequences.note_written(layer)
            return outputs

    def _addresses(self, inputs: Inputs) -> tuple[int, ...]:
        """Where the weights are; in steps between which nobody can move them they are looked at once."""
        weights = [inputs[index] for index in self._floating]
        steps = under_way()
        known: _Weights | None = None if steps is None else steps.weights.get(self)
        if known is not None and all(map(is_, weights, known.weights)):
            return known.addresses
        addresses = tuple([weight.data_ptr() for weight in weights])
        if steps is not None:
            steps.weights[self] = _Weights(weights, addresses, [weight.detach() for weight in weights])
        return addresses

    def _keep(self, key: Hashable, recording: "_Recording") -> None:
        self._recordings[key] = recording
        self._num_unlike += 1
        if self._num_unlike == _PATIENCE:
            logger.warning(
                "%d decoding steps in a row were like none before, so no CUDA graph was used. Give each step inputs "
                "of the same shapes and strides: make position_ids contiguous.",
                _PATIENCE,
            )
        if len(self._recordings) > _MAX_RECORDINGS:
            self._recordings.popitem(last=False)

    def _record(self, recording: "_Recording", inputs: Inputs, sequences: Sequences) -> bool:
        """Record a step, which computes nothing yet; return whether that went well."""
        stream = _stream()
        if stream not in self._pools:
            self._pools[stream] = torch.cuda.graph_pool_handle()
        try:
            with sequences.capturing() as recording.layers:
                recording.record(self._run, inputs, self._pools[stream])
        except Exception as error:
            self._is_given_up = True
            logger.warning(
                "This model can't be recorded as a CUDA graph, so its kernels are launched one by one: %s", error
            )
            return False
        return True


class _Weights(NamedTuple):
    """What a graph reads in all steps of a loop, where that is, and what keeps it there if others take its place."""

    weights: list[Tensor]
    addresses: tuple[int, ...]
    kept: list[Tensor]


class _Recording:
    """One step: where it reads what changes, and the graph once there is one.

    Args:
        inputs: of the pass that has just run.
        moving: which of them are copied.
        all_metadata: those among them.

    Attributes:
        layers: that the step writes, once it is recorded.
    """

    layers: list[int]

    def __init__(self, inputs: Inputs, moving: set[int], all_metadata: list[AttentionMetadata]) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._moving = {index: inputs[index].clone() for index in moving}
        self._lists = [
            (number, metadata.sequences.rows.tables.index(table), layout, num_slots, lists)
            for number, metadata in enumerate(all_metadata)
            for (table, _, layout, num_slots), lists in metadata.made_lists.items()
        ]
        step = all_metadata[0].step
        self._device = self._lists[0][2].device
        self._slots: list[tuple[Tensor, Tensor | None]] = []
        for placement in step.placements:
            slots, token_index = placement.slots(step, self._device)
            self._slots.append((slots.clone(), None if token_index is None else token_index.clone()))
        self._outputs: Any = None

    @property
    def is_done(self) -> bool:
        """Whether the step is recorded."""
        return self._graph is not None

    def fits(self, all_metadata: list[AttentionMetadata]) -> bool:
        """Whether the lists of pages for this metadata are where they were; makes them."""
        made = (
            all_metadata[number].device_lists(all_metadata[number].sequences.rows.tables[group], layout, num_slots)
            is lists
            for number, group, layout, num_slots, lists in self._lists
        )
        return all(made)

    def send(self, inputs: Inputs, all_metadata: list[AttentionMetadata]) -> None:
        """Copy what changes to where the graph reads it."""
        for index, tensor in self._moving.items():
            tensor.copy_(inputs[index], non_blocking=True)
        step = all_metadata[0].step
        for placement, there in zip(step.placements, self._slots, strict=True):
            placement.send(step, self._device, there)

    def record(self, run: Callable[..., Any], inputs: Inputs, pool: Any) -> None:
        """Record the pass over the inputs that were sent."""
        graph = torch.cuda.CUDAGraph()
        static = [self._moving.get(index, value) for index, value in enumerate(inputs)]
        # Other threads may go on allocating memory.
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = run(*static)
        self._graph = graph

    def replay(self) -> Any:
        """Compute the step that was sent; return what the pass returns, in memory of its own."""
        assert self._graph is not None
        self._graph.replay()
        return type(self._outputs)(value.clone() if isinstance(value, Tensor) else value for value in self._outputs)


def _is_repeatable(metadata: AttentionMetadata) -> bool:
    step = metadata.step
    is_plain = step.num_new == 1 and step.view is View.PAGES and metadata.visible is None
    sequences = metadata.sequences
    is_untouched = sequences.is_written_by_attention and not sequences.progress.has_begun
    return is_plain and step.is_settled and is_untouched


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _may_move(value: Any) -> bool:
    """Whether an input that is not floating may be another tensor in each step."""
    return isinstance(value, Tensor) and value.numel() <= _MAX_MOVING


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def _fixed(inputs: Inputs, indices: list[int], moving: set[int], sequences: Sequences) -> Hashable:
    """What a recorded step can't do without: sizes, and the addresses of all that is not moved, of these inputs."""
    fixed: list[Hashable] = [_stream()]
    for index in indices:
        value = inputs[index]
        if isinstance(value, AttentionMetadata):
            continue
        if not isinstance(value, Tensor):
            fixed.append(value)
        elif index in moving:
            fixed.append((value.shape, value.is_contiguous()))
        else:
            fixed.append(value.data_ptr())
    fixed += [group.storage_version for group in sequences.pool.groups]
    step = sequences.step
    assert step is not None  # or there would be no metadata
    for placement in step.placements:
        slots, token_index = placement.slots(step, torch.device("cpu"))
        fixed.append((len(slots), token_index is None))
    return tuple(fixed)
