"""The states of all recurrent layers, of the rows of one cache."""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hf_paged.batch.padding import Counts
from hf_paged.batch.recurrent.layer_states import LayerStates
from hf_paged.pages.pool import PagePool

_UPDATED = -1  # no tensor has this version


class State(NamedTuple):
    """One state of a layer.

    Attributes:
        layer: its index.
        kind: what it is.
        number: that the model has for it.
    """

    layer: int
    kind: Literal["conv", "recurrent"]
    number: int


class States:
    """States beside the pages of some rows, and while a pass is under way those before it.

    Models change a state in place, or hand on another one. A layer is given copies when it asks for its states first
    in a pass, so that those before it are there, to the bit, until the pass is committed. What is not under way is
    never written, so that forks share it.

    That a layer has been through is not said by anybody: the layers that follow show it, and of the last one, that all
    states it asked for have changed.

    A compiled graph can't ask. It reads the states and writes those after its pass into other tensors, of the same
    sizes, which are there before it runs; once it has run, both change places. So it reads and writes two places in
    turns, which stay where they are.

    Args:
        pool: where the pages are.

    Attributes:
        last: the last layer that has asked in the pass under way; -1 for none.
        is_prepared: whether the pass under way may be one of a compiled graph.
    """

    def __init__(self, pool: PagePool) -> None:
        self._specs = pool.layers
        self._layers = {
            index: LayerStates.empty(spec.num_states) for index, spec in enumerate(pool.layers) if spec.num_states
        }
        self._before: dict[int, LayerStates] = {}
        self._room: dict[int, LayerStates] = {}  # for those after a pass of a compiled graph
        self._versions: dict[State, int] = {}  # of the states that were asked for, when they were
        self.last = -1
        self.is_prepared = False
        if self._layers:
            pool.count_in(self)

    def __getitem__(self, layer: int) -> LayerStates:
        return self._layers[layer]

    # In a pass

    @property
    def are_touched(self) -> bool:
        """Whether a pass is under way, or has failed, that has asked for states."""
        return bool(self._before)

    def is_of_another_pass(self, state: State, updates: bool) -> bool:
        """Whether a state is asked for, or updated, a second time, so that the pass before is over."""
        version = self._versions.get(state)
        return version is not None and (version == _UPDATED or not updates)

    def open(self, state: State, updates: bool, records_past: bool) -> None:
        """Let a layer have states that it may change.

        Args:
            state: that is asked for, or about to be updated.
            updates: which of both.
            records_past: whether convolutions keep their past.
        """
        layer = state.layer
        if layer not in self._before:
            before = self._before[layer] = self._layers[layer]
            after = self._room.pop(layer, None)
            with torch.inference_mode(False), torch.no_grad():  # inference tensors would have no version
                if after is None:
                    after = before.changed(Tensor.clone, records_past=records_past)
                    after.is_shared = False
                else:
                    after.fill(before)
            self._layers[layer] = after
        self.last = max(self.last, layer)
        tensor = self._tensor(state, self._layers[layer])
        self._versions[state] = _UPDATED if updates else 0 if tensor is None else tensor._version

    def missing(self, absent: Collection[int]) -> set[int]:
        """Layers that the pass under way has not come to, of those that are not absent."""
        return self._layers.keys() - {*self._before, *self._filled, *absent}

    @property
    def are_done(self) -> bool:
        """Whether the last layer that has asked for states has changed them; those before it have."""
        return self.last < 0 or self._is_done(self.last)

    def are_complete(self, absent: Collection[int]) -> bool:
        """Whether all layers have been through the pass under way, but for those that are absent."""
        return not self.missing(absent) and self.are_done

    @property
    def have_changed(self) -> bool:
        """Whether the pass under way has changed any."""
        return bool(self._filled) or any(map(self._has_changed, self._versions))

    def commit(self) -> None:
        """Forget those before the pass."""
        for layer in self._filled:
            before, after = self._layers[layer], self._room.pop(layer)
            after.is_filled = False
            self._layers[layer] = after
            if not before.is_shared:
                self._room[layer] = before
        self._end()

    def restore(self) -> None:
        """Put those before the pass back."""
        for layer in self._filled:
            self._room[layer].is_filled = False
        self._layers |= self._before
        self._end()

    def _end(self) -> None:
        self._before, self._versions, self.last, self.is_prepared = {}, {}, -1, False

    # In a pass of a compiled graph

    def prepare(self, absent: Collection[int]) -> None:
        """Let the pass under way be one of a compiled graph, over one token of each row, if all layers have states.

        Args:
            absent: layers that hold nothing.
        """
        layers = self._layers.keys() - set(absent)
        for layer in layers - self._room.keys():
            states = self._layers[layer]
            if layer in self._before or not any(states.has_previous_state.values()):
                return
            with torch.inference_mode(False), torch.no_grad():
                # Graphs are made for one kind of tensors.
                self._layers[layer] = states = states.changed(_plain, records_past=False)
                self._room[layer] = states.changed(torch.empty_like)
            self._room[layer].is_shared = False
        self.is_prepared = True

    def in_graph(self, layer: int) -> LayerStates:
        """The states after a pass, for the graph of this pass to change in place: they begin as those before.

        Dynamo, which traces this, sets the attribute once the whole graph has run.
        """
        after = self._room[layer]
        if not after.is_filled:
            after.is_filled = True
            after.fill(self._layers[layer])
        return after

    @property
    def _filled(self) -> list[int]:
        return [layer for layer, states in self._room.items() if states.is_filled]

    def _is_done(self, layer: int) -> bool:
        spec, before = self._specs[layer], self._before[layer]
        is_first = not any(before.has_previous_state.values())
        # Layers that attend as well have some of their states behind attention.
        expected = before.has_previous_state if not is_first or spec.stores else {}
        asked = {state for state in self._versions if state.layer == layer}
        if any((has or is_first) and State(layer, "conv", number) not in asked for number, has in expected.items()):
            return False
        return all(map(self._has_changed, asked))

    def _has_changed(self, state: State) -> bool:
        tensor, version = self._tensor(state, self._layers[state.layer]), self._versions[state]
        if version == _UPDATED or tensor is None:
            return version == _UPDATED
        before = self._tensor(state, self._before[state.layer])
        # What goes around torch, as some kernels do, counts no version.
        return tensor._version != version or before is None or not torch.equal(tensor, before)

    def _tensor(self, state: State, states: LayerStates) -> Tensor | None:
        return (states.conv_states if state.kind == "conv" else states.recurrent_states)[state.number]

    # Between two passes

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, without those before the pass under way, and what compiled graphs are going to write to."""
        held = *self._layers.values(), *self._room.values()
        return [tensor for states in held for tensor in states.tensors]

    @property
    def only_convolve(self) -> bool:
        """Whether layers are known to have no recurrent state, as all have convolved."""
        layers = self._layers.values()
        return not any(any(states.is_recurrent_states_initialized.values()) for states in layers) and all(
            any(states.is_conv_states_initialized.values()) for states in layers
        )

    def clear(self) -> None:
        """Have seen nothing."""
        self._layers = {layer: LayerStates.empty(len(states.conv_states)) for layer, states in self._layers.items()}
        self._room.clear()
        self._end()

    def hold(self, layer: int, states: LayerStates) -> None:
        """Have these states of a layer."""
        self._layers[layer] = states

    def select(self, indices: Sequence[int]) -> None:
        """Let row `i` be what row `indices[i]` was."""
        on_device: dict[torch.device, Tensor] = {}

        def selected(state: Tensor) -> Tensor:
            if len(indices) == len(state) and all(index == row for row, index in enumerate(indices)):
                return state
            if state.device not in on_device:
                on_device[state.device] = torch.tensor(indices, dtype=torch.int64, device=state.device)
            return state.index_select(0, on_device[state.device])

        self._layers = {layer: states.changed(selected) for layer, states in self._layers.items()}
        self._room.clear()

    def fork(self, pool: PagePool) -> "States":
        """Return the same states, sharing the tensors until one of both goes on."""
        other = States(pool)
        for states in self._layers.values():
            states.is_shared = True
        other._layers = {layer: states.changed(lambda state: state) for layer, states in self._layers.items()}
        return other

    def join(self, parts: Sequence["States"]) -> None:
        """Hold the rows of others, one after another, without the past that is recorded."""
        for layer in self._layers:
            first, *others = [part[layer].truncated(0) for part in parts]
            following = [iter(states.tensors) for states in others]
            self._layers[layer] = first.changed(partial(_joined, following))

    def check_truncation(self, count: int, ends: Counts) -> None:
        """Raise ValueError if rows can't end before the columns that they shall end before.

        Args:
            count: columns that there are.
            ends: `(num_rows,)` how many of them are left of each row.
        """
        if not self._layers or not ends.any() or (ends == count).all():
            return
        if (ends != ends[0]).any():
            raise ValueError(
                f"The rows were to end in columns {ends.tolist()}, but this cache has recurrent layers, whose states "
                "are of all columns: nothing has changed. Take the same number of columns back in all rows."
            )
        num_left = int(ends[0])
        num_removed = count - num_left
        for layer, states in self._layers.items():
            if states.needs_more(num_removed, num_left):
                kind = self._specs[layer].kind
                if any(states.is_recurrent_states_initialized.values()):
                    raise ValueError(
                        f"{num_removed} tokens were to be taken back, but layer {layer} is a {kind!r} layer with a "
                        "recurrent state, of which none can be: nothing has changed. Fork the cache before tokens "
                        "that may be taken back (cache.fork()), or compute the prompt anew after cache.reset()."
                    )
                raise ValueError(
                    f"{num_removed} tokens were to be taken back, but layer {layer} is a {kind!r} layer that has not "
                    "recorded so much of its past: nothing has changed. Call cache.activate_past_recording() before "
                    "the passes that may be taken back."
                )

    def truncate(self, count: int, ends: Counts) -> None:
        """Take the last columns back, and drop the past that is recorded; arguments as for `check_truncation`."""
        if ends.any():
            num_removed = count - int(ends[0])
            self._layers = {layer: states.truncated(num_removed) for layer, states in self._layers.items()}
            self._room.clear()
        else:
            self.clear()


def _plain(state: Tensor) -> Tensor:
    is_plain = state.is_contiguous() and not state.is_inference()
    return state if is_plain else state.clone(memory_format=torch.contiguous_format)


def _joined(following: Sequence[Iterator[Tensor]], state: Tensor) -> Tensor:
    return torch.cat([state, *map(next, following)])
