"""The sequences of one cache, and the step that they are in."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from hf_paged._torch.surroundings import check_surroundings
from hf_paged.batch.edits import Edits
from hf_paged.batch.handed_on import HandedOn
from hf_paged.batch.padding import BoolMatrix, Counts
from hf_paged.batch.recurrent.states import State
from hf_paged.batch.rows import Rows
from hf_paged.batch.steps.between import BetweenSteps
from hf_paged.batch.steps.decode_writer import DecodeWriter, decode_writers
from hf_paged.batch.steps.padded import PaddedStep
from hf_paged.batch.steps.progress import Progress, in_turn, too_deep
from hf_paged.batch.steps.step import Step
from hf_paged.batch.told import ToldPass, mask_on_host
from hf_paged.errors import NotPackable, UnclearPassError
from hf_paged.pages.pool import PagePool

_OWN_WAY = "it makes a pass of its own while it is given a packed one"


class Sequences(BetweenSteps):
    """Rows, and the step under way: it is reserved, then committed or rolled back.

    A step is reserved before the first layer and committed when the last layer was written. Layers that the model
    passes over hold nothing. A pass that stops before the last layer has failed, or belongs to a model without those
    behind: nothing here can tell, so the next one is refused until `roll_back`. What fails in here is rolled back.

    Args:
        pool: where the pages are.
        begins_steps: whether a pass of the model begins a step; else somebody else calls `begin` for each.

    Attributes:
        rows: what is cached.
        step: the one under way; None between two of them.
        progress: of that step through the layers.
        edits: what callers have done to copies.
        handed_on: keys and values of the last pass that the model may have handed on.
        salt: what keeps its prefixes apart from those of caches with another one.
    """

    def __init__(self, pool: PagePool, *, begins_steps: bool = True) -> None:
        self.pool = pool
        self.rows = Rows(pool)
        self.step: Step | None = None
        recurrent = [layer for layer, spec in enumerate(pool.layers) if spec.num_states]
        self.progress = Progress(pool.group_of_layer, recurrent, len(pool.layers))
        self.edits = Edits()
        self.handed_on = HandedOn()
        self.salt: str | None = None
        self.told: ToldPass | None = None  # what a loop says of the pass that it is making
        self._begins_steps = begins_steps
        self._is_reserved_by_mask = False  # whether it was our mask function that has begun the pass under way
        self._captured_layers: list[int] | None = None  # those of the pass under way, if it is only captured
        self._records_past = False
        self._writers: dict[int, DecodeWriter] = {}  # by group, where a step adds one token to each row

    @property
    def lengths(self) -> Counts:
        """`(rows.num_committed,)` tokens of each row, padding excluded, without those of a step under way."""
        self.apply_edits()
        return self.rows.lengths[: self.rows.num_committed]

    # A step is reserved

    @in_turn
    def begin_pass(self, layer: int, num_new: int) -> None:
        """Note that a forward pass begins, if it is a new one, as `num_new` columns are announced to a layer.

        Raises:
            UnclearPassError: if the pass before may have failed, or another thread is in one; nothing has changed.
        """
        self.apply_edits()
        is_over = self.step is not None and (layer <= self.progress.last or self.progress.is_of_another_thread)
        if is_over or self.rows.states.last > layer:
            self._close_step()
        elif self.rows.states.have_changed:
            return  # a layer wants to know, in mid-pass
        self.rows.states.restore()
        self._is_reserved_by_mask = False
        self.progress.announce(self.rows.columns.count)
        self.rows.known_ids.begin_pass(self, self.rows.columns.count, num_new, self.told)

    @in_turn
    def reserve(
        self,
        num_rows: int,
        num_new: int,
        attention_mask: Tensor | None,
        *,
        num_layers: int | None = None,
        reads_pages: bool = True,
    ) -> Step:
        """Reserve a step: check it, take its pages, and say which slots its tokens go to.

        Args:
            num_rows: rows of the batch. One row that is cached makes as many rows of itself.
            num_new: new columns.
            attention_mask: `(num_rows, num_columns)`, 0 for padding; None without padding.
            num_layers: layers that the model has by its configuration; None if that is not known.
            reads_pages: whether attention reads pages in place, if any are filled; else it is handed a copy.

        Raises:
            OutOfPagesError: if the pool has too few pages, or by the first layer, where rows may be equal; unchanged.
            ValueError: if rows, mask or layers don't fit what is cached; nothing has changed.
        """
        if not self._begins_steps:
            return self._prepared(num_rows, num_new, attention_mask)
        check_surroundings()
        self.apply_edits()
        if num_layers is not None and num_layers > len(self.pool.layers):
            raise too_deep(num_layers, len(self.pool.layers))
        self.progress.own(self.rows.columns.count)
        _, new, past_is_visible = self.rows.split(num_rows, num_new, mask_on_host(attention_mask, self.told))
        self._is_reserved_by_mask = True
        if self.step is not None and self.step.matches(num_rows, num_new, new):
            return self.step  # another mask of the same pass
        step = self._begin_padded(num_rows, num_new, new, past_is_visible, reads_pages, num_layers)
        if num_new == 1 and not self._records_past:
            self.rows.states.prepare(self.rows.absent)
        return step

    def begin(self, step: Step, num_layers: int | None = None) -> None:
        """Begin a step whose pages are reserved, of a model that has so many layers; None: as many as ever."""
        self._is_reserved_by_mask |= step.has_own_mask
        is_first = self.rows.are_empty
        if is_first:
            self.rows.absent = frozenset()
        end = min(num_layers or self.progress.num_layers, self.progress.num_layers)
        self.progress.begin(self.rows.absent, end if is_first else len(self.pool.layers))
        self.step = step
        self._writers = decode_writers(step, self.pool)

    def _prepared(self, num_rows: int, num_new: int, attention_mask: Tensor | None) -> Step:
        self.commit_first()
        is_masked = attention_mask is not None and not attention_mask.all()
        if self.step is None or is_masked or not self.step.matches(num_rows, num_new, None):
            raise NotPackable(_OWN_WAY)
        self._is_reserved_by_mask = True
        return self.step

    def _begin_padded(
        self,
        num_rows: int,
        num_new: int,
        new: BoolMatrix | None,
        past_is_visible: bool,
        reads_pages: bool,
        num_layers: int | None,
    ) -> Step:
        if not self._begins_steps:
            raise NotPackable(_OWN_WAY)
        if self.step is not None or not self.rows.states.are_touched:  # else by layers of this pass
            self._close_step()
            self.drop_past()
        rows = self.rows
        rows.admit(num_rows)
        try:
            step = PaddedStep(
                rows.tables, rows.columns, num_new, new, past_is_visible, reads_pages, self._records_past
            )
        except Exception:
            rows.roll_back()
            raise
        self.begin(step, num_layers)
        return step

    # and written, layer by layer

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens of a layer and return what its attention function is to be handed.

        Args:
            layer: its index.
            keys: `(num_rows, num_kv_heads, num_new, head_dim)`.
            values: like `keys`.

        Raises:
            OutOfPagesError: if the tokens don't fit; nothing is written.
            ValueError: if shapes, dtype or device don't fit; nothing is written.
        """
        group = self.pool.group_of_layer[layer]
        writer = self._writers.get(group)
        result = None
        try:
            if self.edits.copies and self.step is not None:
                self.edits.check_untouched(layer)
            if writer is not None and writer.step.masks and self._is_reserved_by_mask and self.awaits(layer):
                result = writer.write(layer, keys, values)
            if result is None:
                storage = self.pool.open_storage(layer, keys, values)
                step = self._step_for(layer, keys, values)
                if step.arrivals is not None:
                    step.arrivals.wait_for(layer)
                step.write(group, storage, keys, values)
                result = step.read(group, storage, keys, values)
        except UnclearPassError:
            raise
        except BaseException:
            self.roll_back()
            raise
        self.note_written(layer)
        return result

    def note_written(self, layer: int) -> None:
        """Note that the step went through a layer; the last one commits it."""
        if self._captured_layers is not None:
            self._captured_layers.append(layer)
            return
        self.progress.missing.discard(layer)
        self.progress.last = max(layer, self.progress.last)
        if not self.progress.missing and self.rows.states.are_complete(self.rows.absent):
            self.commit_first()

    @in_turn
    def open_state(self, state: State, *, updates: bool) -> None:
        """Let a recurrent layer have a state that it may change, and keep the one before until the step is committed.

        Attention may come later, and keep its mask to itself, so that there may be no step yet.

        Args:
            state: that it asks for, or is about to update.
            updates: which of both.

        Raises:
            UnclearPassError: if the pass before may have failed, or another thread is in one; nothing has changed.
            ValueError: if the passes before have left the layer out; nothing has changed.
        """
        states, step = self.rows.states, self.step
        is_abandoned = step is not None and not step.masks and not self.progress.has_begun
        if (is_again := states.is_of_another_pass(state, updates)) and not states.have_changed:
            states.restore()
        elif is_again or (is_abandoned and not states.are_touched):
            self._close_step()
        if self.step is None and not states.are_touched:
            self.drop_past()
        self.progress.own()
        if state.layer in self.rows.absent:
            raise self.progress.left_out(state.layer)
        self.rows.states.open(state, updates, self._records_past)
        self.progress.touched = self.rows.states.last

    @contextmanager
    def capturing(self) -> Iterator[list[int]]:
        """Let a pass be made that writes nothing, as its step is still to come; give the layers it goes through."""
        self._captured_layers = []
        try:
            yield self._captured_layers
        finally:
            self._captured_layers = None

    def awaits(self, layer: int) -> bool:
        """Whether a layer is still to be written in the step under way."""
        return self.step is not None and layer in self.progress.missing

    @property
    def has_written_nothing(self) -> bool:
        """Whether no layer has written the step under way, which is not only captured."""
        return self._captured_layers is None and not self.progress.has_begun

    @property
    def is_written_by_attention(self) -> bool:
        """Whether the attention function of a compiled graph is going to call `write`, so that `update` need not."""
        return self.step is not None and self._is_reserved_by_mask

    @in_turn
    def _step_for(self, layer: int, keys: Tensor, values: Tensor) -> Step:
        """Return the step that new keys of a layer belong to, beginning one if no mask function did."""
        num_rows, _, num_new, _ = keys.shape
        missing, progress = self.progress.missing, self.progress
        if self.step is not None and layer not in missing and progress.has_reached_the_end:
            self._close_step()
        if self.step is None:
            self.apply_edits()
        step = self.step
        if layer in self.rows.absent:
            raise progress.left_out(layer)
        if step is None or not progress.has_begun:
            progress.own(self.rows.columns.count)
            fits = step is not None and (num_rows, num_new) == (step.num_rows, step.num_new)
            if step is None or not fits or not self._is_reserved_by_mask or not step.masks:
                # Another attention than paged_flex keeps its mask to itself, so that every column counts as a token.
                check_surroundings()
                self.rows.check_shape(num_rows, num_new)
                new = self.rows.columns_for(num_rows).without_released(None, num_rows, num_new)
                step = self._begin_padded(num_rows, num_new, new, True, False, None)
        elif layer not in missing:
            raise progress.updated_twice(layer)
        elif (num_rows, num_new) != (step.num_rows, step.num_new):
            raise progress.other_shape(layer, (num_rows, num_new), (step.num_rows, step.num_new))
        step.settle_duplicates(keys, values)
        return step

    # then committed or rolled back

    @in_turn
    def commit_first(self) -> None:
        """Commit the first step, if it is over: its last layer says that those not written are passed over.

        Any later step is committed as soon as its last layer is written, unless that is a recurrent one, of which
        only its states say that it is over.
        """
        if (step := self.step) is None or not self.rows.states.are_done:
            return
        if not self.progress.missing and self.rows.states.are_complete(self.rows.absent):
            self._commit(step)
        elif self.progress.has_reached_the_end and self.rows.are_empty:
            self.rows.absent = frozenset(self.progress.missing | self.rows.states.missing(()))
            self._commit(step)

    def _commit(self, step: Step) -> None:
        self.rows.commit(step.counts, step.next_columns, is_plain=step.is_plain, hides_tokens=step.hides_tokens)
        self._writers.clear()
        self.edits.copies.clear()  # they are out of date
        self.progress.end()
        self.step = None

    @in_turn
    def roll_back(self, step: Step | None = None) -> None:
        """Forget a step that did not go through all layers.

        Args:
            step: do so only if it is this one.
        """
        if step is None:
            self.commit_first()
        if step is None or step is self.step:
            self._roll_back()

    def _roll_back(self) -> None:
        self.handed_on.unshare()
        self.rows.states.restore()
        self.progress.touched = -1
        if self.step is not None:
            self.step.is_cancelled = True
            self.progress.end()
            self._writers.clear()
            self.rows.roll_back()
            self.step = None

    def take_back(self, num_new: int) -> None:
        """Forget a pass over `num_new` columns that goes on behind the last layer."""
        if self.step is not None:
            self.roll_back()
        elif self.rows.columns.count == num_new:
            self.clear()
        elif self.rows.columns.count > num_new:
            self.truncate(self.rows.columns.count - num_new)

    def end_step(self) -> None:
        """Come to a state between two steps.

        Raises:
            UnclearPassError: if it can't be told whether the last pass has failed; nothing has changed.
        """
        self._close_step()
        self.drop_past()

    @in_turn
    def _close_step(self) -> None:
        """Forget the step under way if it wrote nothing, since another one begins."""
        self.commit_first()
        step = self.step
        if (step is not None and self.progress.is_unclear(step.masks)) or self.rows.states.have_changed:
            raise self.progress.unclear(len(self.pool.layers))
        self._roll_back()

    # Between two steps

    def apply_edits(self) -> None:
        """Commit, and let the pages hold what was done to copies of them, unless a step is under way."""
        self.commit_first()
        if self.edits.copies and self.step is None:
            self.handed_on.unshare()
            self.edits.absorb(self)

    def drop_past(self) -> None:
        """Apply edits, and release what has left a window, unless it is recorded or a step is under way."""
        # Not as soon as a step is committed: the attention of its last layer is still to come.
        self.apply_edits()
        if self.step is None and not self._records_past:
            self.handed_on.unshare()
            self.rows.drop_past()

    def truncate(self, count: int, *, keeps_past: bool = False) -> None:
        """Keep the first `count` columns, and drop what no query will see any more, unless `keeps_past`.

        Raises:
            ValueError: if that takes tokens which have left a window; nothing has changed.
        """
        self.end_step()
        copies = self.edits.truncated(self, count)
        self.rows.truncate(count)
        self.edits.hold(self, copies)
        if not keeps_past:
            self.rows.drop_past()
