"""Which rows run, and which wait."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hf_paged.cache.paged import PagedCache
from hf_paged.cache.prompt.prefill import usual_chunk
from hf_paged.decoding.many.batch import Batch
from hf_paged.decoding.many.choice import choose
from hf_paged.decoding.many.drafts.drafter import RowDrafter
from hf_paged.decoding.many.filling import Filling
from hf_paged.decoding.many.prompt import Prompt
from hf_paged.decoding.many.result import ManyStats, Result
from hf_paged.decoding.many.room import Room
from hf_paged.decoding.many.row import Row, prepare
from hf_paged.errors import OutOfPagesError
from hf_paged.pages.pool import PagePool


class Schedule:
    """Prompts, those that are being computed, and the batch, which takes a step whenever a piece of these is done.

    When pages run short, the rows of the newest prompts wait. The oldest one goes on in any case, so that all end.

    Args:
        model: that generates.
        prompts: any number of them, maybe without end; one is asked for when there may be room for it.
        config: settings of all prompts; None for those of the model.
        settings: arguments of `generate()` for all prompts.
        pool: where the pages are.
        max_rows: rows of the batch, at most.
        drafter: makes drafts; None: none are made.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Iterable[Any],
        config: GenerationConfig | None,
        settings: dict[str, Any],
        pool: PagePool,
        max_rows: int,
        drafter: RowDrafter | None = None,
    ) -> None:
        self._model = model
        self._config = config
        self._settings = settings
        self._pool = pool
        self._max_rows = max_rows
        self._chunk = usual_chunk(model.device)
        self._prompts: Iterator[tuple[int, Any]] = enumerate(prompts)
        self._waiting: deque[Row] = deque()  # in the order of their prompts
        self._filling: Filling | None = None
        self._batch = Batch(model, pool, drafter)
        self._is_full = False  # whether pages have run short since a row left
        self._results: list[Result] = []
        self._counts = dict.fromkeys(("num_prompt_tokens", "num_new_tokens", "num_steps", "num_preempted"), 0)

    def advance(self) -> list[Result] | None:
        """Compute a piece of new prompts, and a step of the batch.

        Returns:
            Of the prompts that have ended; None if all have.
        """
        self._refill()
        if self._batch.rows:
            self._step()
        elif self._filling is None and not self._waiting and not self._results:
            return None
        results, self._results = self._results, []
        return results

    def give_back(self) -> None:
        """Give all pages back, whatever was under way."""
        self._batch.close()
        caches = [row.parked for row in self._waiting]
        if self._filling is not None:
            caches.append(self._filling.cache)
        for cache in caches:
            if cache is not None:
                cache.reset()

    def stats(self) -> ManyStats:
        """How far it is, but for what has been given out."""
        filling = [] if self._filling is None else self._filling.rows
        num_running = len(self._batch.rows) + len(filling)
        return ManyStats(num_running=num_running, num_waiting=len(self._waiting), **self._counts)

    # Prompts become rows

    def _refill(self) -> None:
        if self._filling is None and not (self._is_full and self._batch.rows):
            self._admit()
        filling = self._filling
        if filling is None:
            return
        try:
            is_done = filling.advance()
        except OutOfPagesError as error:
            if self._batch.rows or len(filling.rows) > 1:
                self._abandon(filling)
            else:
                self._fail(filling.rows[0], error)
                filling.cache.reset()
                self._filling = None
            return
        if is_done:
            self._is_full = self._is_full and bool(self._batch.rows)
            self._batch.join(filling.rows, filling.cache)
            self._filling = None

    def _admit(self) -> None:
        """Begin to compute the next prompts, as many as make a piece and as there is room for."""
        rows: list[Row] = []
        room = Room(self._pool, kept_free=len(self._batch.rows))
        origin = self._batch.cache._sequences.rows.origin
        most = 1 if self._is_full else self._max_rows
        while len(self._batch.rows) + len(rows) < most:
            row = self._next_row()
            if row is None:
                break
            is_alone = not self._batch.rows and not rows
            num_tokens = sum(len(other.ids) for other in [*rows, row])
            fits = room.take(row.ids, None if row.parked else origin)
            if not is_alone and not (fits and num_tokens <= max(self._chunk, len(row.ids))):
                self._wait([row])
                break
            if row.parked is None:
                rows.append(row)
            elif not self._bring_back(row, row.parked):
                break
            if not fits:  # but for its beginning, maybe
                break
        if rows:
            self._filling = Filling(self._model, PagedCache(pool=self._pool), rows, self._chunk)

    def _bring_back(self, row: Row, parked: PagedCache) -> bool:
        try:
            self._batch.join([row], parked)
        except OutOfPagesError as error:
            if self._batch.rows:
                self._wait([row])
            else:
                self._fail(row, error)
                parked.reset()
            return False
        row.parked = None
        return True

    def _next_row(self) -> Row | None:
        """The row that has waited longest; else that of the next prompt that doesn't fail; None without."""
        if self._waiting:
            return self._waiting.popleft()
        for index, given in self._prompts:
            try:
                prompt = Prompt.read(index, given)
                row = prepare(self._model, self._pool, prompt, self._config, self._settings)
            except Exception as error:
                self._results.append(Result(index, given, [], "error", error))
                continue
            self._counts["num_prompt_tokens"] += len(row.ids)
            return row
        return None

    # and take steps

    def _step(self) -> None:
        batch = self._batch
        batch.draft()
        while True:
            try:
                scores = batch.step()
                break
            except OutOfPagesError as error:
                self._is_full = True
                if any(batch.drafts):
                    batch.drafts = [[] for _ in batch.rows]
                elif self._filling is not None:
                    self._abandon(self._filling)
                elif len(batch.rows) > 1:
                    self._wait([batch.take_newest()])
                    batch.draft()
                    self._counts["num_preempted"] += 1
                else:
                    self._fail(batch.rows[0], error)
                    batch.keep([])
                    return
        self._counts["num_steps"] += 1
        kept = self._go_on(scores)
        if len(kept) < len(batch.rows):
            batch.keep(kept)
            self._is_full = False

    def _go_on(self, scores: Tensor) -> list[int]:
        """Give rows the tokens that a step has made, and return which go on."""
        batch = self._batch
        before, ended = [len(row.ids) for row in batch.rows], set[int]()
        running, place = list(range(len(batch.rows))), 0  # those whose draft was right up to this place
        while running:
            tokens = choose([batch.rows[index] for index in running], scores[running, place])
            ended |= {index for index, token in zip(running, tokens, strict=True) if not self._goes_on(index, token)}
            running = [
                index
                for index, token in zip(running, tokens, strict=True)
                if index not in ended and batch.drafts[index][place : place + 1] == [token]
            ]
            place += 1
        batch.go_on([len(row.ids) - count for row, count in zip(batch.rows, before, strict=True)])
        return [index for index in range(len(batch.rows)) if index not in ended]

    def _goes_on(self, index: int, token: int | Exception) -> bool:
        """Give a row its token; return whether it goes on."""
        row = self._batch.rows[index]
        try:
            if isinstance(token, Exception):
                raise token
            self._counts["num_new_tokens"] += 1
            reason = row.add(token, self._model.device)
        except Exception as error:
            self._fail(row, error)
            return False
        if reason is not None:
            self._results.append(row.result(reason))
        return reason is None

    # or have to wait

    def _abandon(self, filling: Filling) -> None:
        self._is_full = True
        self._filling = None
        filling.cache.reset()
        self._wait(filling.rows)

    def _wait(self, rows: Iterable[Row]) -> None:
        self._waiting = deque(sorted([*self._waiting, *rows], key=lambda row: row.prompt.index))

    def _fail(self, row: Row, error: Exception) -> None:
        self._results.append(row.result("error", error))
