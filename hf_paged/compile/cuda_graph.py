"""Decoding steps on a GPU, recorded once as a CUDA graph and repeated.

A step launches some hundred kernels, and most of them take less time than it takes to launch them. A graph launches
them all at once. It repeats them with the same addresses and sizes: what changes from step to step (token ids,
positions, slots, lists of pages) is copied to where the graph reads it, and where anything else has changed (the pool
has grown, there is another cache) the step is recorded anew.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from hf_paged.attention.backends.block_lists import Layout, Tiles
from hf_paged.attention.metadata import Plan
from hf_paged.batch.sequences import Batch
from hf_paged.batch.step import View

logger = logging.getLogger(__name__)

_MAX_RECORDINGS = 16  # for each compiled graph; what was used least recently is dropped
_MAX_MOVING = 2**16  # elements of what is copied in each step; weights may be integers, too
_PATIENCE = 32  # steps in a row that none before them was like

Inputs = tuple[Any, ...]


class StepGraphs:
    """A compiled forward pass that repeats its decoding steps.

    Args:
        run: the forward pass; takes tensors, numbers and plans, and returns tensors.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        # Of memory, by stream. Recordings share it, since none runs beside another and what they return is copied.
        self._pools: dict[int, Any] = {}
        self._written: set[int] = set()  # inputs that the pass writes to: they are written where they are
        self._is_given_up = False
        self._num_unlike = 0

    def __call__(self, *inputs: Any) -> Any:
        """Run the pass, or repeat it."""
        plans = [value for value in inputs if isinstance(value, Plan)]
        if self._is_given_up or not plans or not all(map(_is_repeatable, plans)):
            return self._run(*inputs)
        batch = plans[0].batch
        with ExitStack() as stack:
            for group in batch.pool.groups:
                stack.enter_context(group.staying_in_place())
            moving = {index for index, value in enumerate(inputs) if _may_move(value)} - self._written
            key = _fixed(inputs, moving, batch)
            recording = self._recordings.get(key)
            if recording is None or not recording.fits(plans):
                # The first time kernels are compiled, and it shows which lists of pages are read.
                versions = {index: inputs[index]._version for index in moving if not inputs[index].is_inference()}
                outputs = self._run(*inputs)
                written = {index for index, version in versions.items() if inputs[index]._version != version}
                if written:
                    self._written |= written
                else:
                    self._keep(key, _Recording(inputs, moving, plans))
                return outputs
            self._num_unlike = 0
            self._recordings.move_to_end(key)
            recording.send(inputs, plans)
            if not recording.is_done and not self._record(recording, inputs, batch):
                return self._run(*inputs)
            outputs = recording.repeat()
            for layer in recording.layers:
                batch.note_written(layer)
            return outputs

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

    def _record(self, recording: "_Recording", inputs: Inputs, batch: Batch) -> bool:
        """Record a step, which computes nothing yet; return whether that went well."""
        stream = _stream()
        if stream not in self._pools:
            self._pools[stream] = torch.cuda.graph_pool_handle()
        try:
            with batch.rehearsing() as recording.layers:
                recording.record(self._run, inputs, self._pools[stream])
        except Exception as error:
            self._is_given_up = True
            logger.warning(
                "This model can't be recorded as a CUDA graph, so its kernels are launched one by one: %s", error
            )
            return False
        return True


class _Recording:
    """One step: where it reads what changes, and the graph once there is one.

    Args:
        inputs: of the pass that has just run.
        moving: which of them are copied.
        plans: those among them.

    Attributes:
        layers: that the step writes, once it is recorded.
    """

    layers: list[int]

    def __init__(self, inputs: Inputs, moving: set[int], plans: list[Plan]) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._moving = {index: inputs[index].clone() for index in moving}
        self._lists: list[tuple[int, int, Layout, int, Tiles]] = [
            (number, plan.batch.tables.index(table), layout, num_slots, tiles)
            for number, plan in enumerate(plans)
            for (table, _, layout, num_slots), tiles in plan.made_tiles.items()
        ]
        step = plans[0].step
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

    def fits(self, plans: list[Plan]) -> bool:
        """Whether the lists of pages for these plans are where they were; makes them."""
        made = (
            plans[number].tiles(plans[number].batch.tables[group], layout, num_slots) is tiles
            for number, group, layout, num_slots, tiles in self._lists
        )
        return all(made)

    def send(self, inputs: Inputs, plans: list[Plan]) -> None:
        """Copy what changes to where the graph reads it."""
        for index, tensor in self._moving.items():
            tensor.copy_(inputs[index], non_blocking=True)
        step = plans[0].step
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

    def repeat(self) -> Any:
        """Compute the step that was sent; return what the pass returns, in memory of its own."""
        assert self._graph is not None
        self._graph.replay()
        return type(self._outputs)(value.clone() if isinstance(value, Tensor) else value for value in self._outputs)


def _is_repeatable(plan: Plan) -> bool:
    step = plan.step
    is_plain = step.num_new == 1 and step.view is View.PAGES and plan.visible is None
    return is_plain and step.is_settled and plan.batch.is_untouched


def _may_move(value: Any) -> bool:
    """Whether an input may be another tensor in each step. Weights are read where they are."""
    return isinstance(value, Tensor) and not value.is_floating_point() and value.numel() <= _MAX_MOVING


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def _fixed(inputs: Inputs, moving: set[int], batch: Batch) -> Hashable:
    """What a recorded step can't do without: sizes, and the addresses of all that is not moved."""
    fixed: list[Hashable] = [_stream()]
    for index, value in enumerate(inputs):
        if isinstance(value, Plan):
            continue
        if not isinstance(value, Tensor):
            fixed.append(value)
        elif index in moving:
            fixed.append((value.shape, value.is_contiguous()))
        else:
            fixed.append(value.data_ptr())
    for group in batch.pool.groups:
        for storage in group.storages():
            fixed.append((storage.keys.data_ptr(), storage.values.data_ptr(), storage.num_pages))
    step = batch.step
    assert step is not None  # or there would be no plan
    for placement in step.placements:
        slots, token_index = placement.slots(step, torch.device("cpu"))
        fixed.append((len(slots), token_index is None))
    return tuple(fixed)
