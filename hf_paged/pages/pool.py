"""The pages of all layers, which several caches may share."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_paged._torch.host_memory import free_bytes
from hf_paged._torch.surroundings import check_dense, check_surroundings
from hf_paged._transformers import layer_specs, least_token_bytes, model_in, recurrent_layer, token_bytes_by_device
from hf_paged.pages.group import PageGroup, PageHolder
from hf_paged.pages.prefix_index import PrefixIndex
from hf_paged.pages.stats import HoldsStates, MemoryStats, bytes_of_states
from hf_paged.pages.storage import LayerStorage, check_room, disagreement
from hf_paged.pages.tiers.base import PageTier
from hf_paged.pages.tiers.host import HostTier
from hf_paged.pages.tiers.prefixes import PrefixTiers
from hf_paged.pages.tiers.write_behind import WriteBehind

PAGE_SIZES = (16, 32, 64, 128, 256)
"""Tokens per page. A page is one key/value tile of the FlexAttention kernel, hence a power of two of at least 16."""

_STORED = 32  # pages whose content is on the host at once while it is stored


class PagePool:
    """Key and value storage of every layer in pages of one size, allocated when the first key shows its device.

    Caches, forks, beams and threads hold pages of one pool. The pool is safe to share between threads; a single
    cache is not. Layers with different windows keep different tokens, so each kind is a group with pages of its own.

    Args:
        config: the model's configuration; says how many layers store keys and values.
        num_pages: at most so many pages in each group. Layers without a window reserve theirs at once; those with one
            need few and grow. None: all grow without a bound.
        page_size: tokens per page: 16, 32, 64, 128 or 256. Small pages waste less memory, large ones are faster.
        watermark: pages that new rows leave free for the rows that are already running.
        prefix_cache: whether full pages that `PagedCache.prefill` has computed can be found by their tokens, also once
            nobody holds them, until pages run short. Without a bound they are evicted before the pool grows, once they
            take a quarter of the memory that would be free without them.
        host_bytes: memory of the host, at most, for rows that are swapped out, and for pages of prefixes that were
            evicted. They are brought back where that is expected to be faster than computing them. 0: none.
        store: where pages of prefixes go that make room in memory of the host, or on the device if `host_bytes` is 0,
            such as a `PrefixStore`. It takes `prefix_cache`.

    Attributes:
        prefix_index: finds them; None without.
        host: memory of the host; None without.
        store: as given.

    Raises:
        ValueError: for a page size that the kernel can't take, a model whose layers keep no keys and values, a prefix
            cache for a model with an encoder, a store without a prefix cache or for a model with recurrent layers, or
            more pages than there is memory for: as far as the configuration says how large they are, else by the
            first key.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        num_pages: int | None = None,
        page_size: int = 128,
        watermark: int = 0,
        *,
        prefix_cache: bool = False,
        host_bytes: int = 0,
        store: PageTier | None = None,
    ) -> None:
        num_pages = None if num_pages is None else check_count("num_pages", num_pages, least=1)
        watermark = check_count("watermark", watermark, least=0)
        self.config = check_config(config).get_text_config(decoder=True)
        self.has_encoder = bool(config.is_encoder_decoder)
        """Whether the decoder also attends to an encoder, whose keys and values are not in these pages."""
        self.page_size = check_page_size(page_size)
        self.layers = layer_specs(config)
        if num_pages is not None:
            num_reserving = sum(spec.stores and spec.window is None for spec in self.layers)
            check_room(num_pages, page_size, num_reserving * least_token_bytes(config), None)
        self.max_pages = num_pages
        host_bytes = check_count("host_bytes", host_bytes, least=0)
        self.store = store
        written = None if store is None else WriteBehind(store)
        self.host = HostTier(host_bytes, written) if host_bytes else None
        by_window: dict[int | None, list[int]] = {}
        for index, spec in enumerate(self.layers):
            if spec.stores:
                by_window.setdefault(spec.window, []).append(index)
        self.groups = [
            PageGroup(
                layers, window, num_pages if num_pages and window is None else 0, num_pages, page_size, watermark
            )
            for window, layers in by_window.items()
        ]
        if self.host is not None:
            for group in self.groups:
                group.move_idle = self.host.move_one
        self.group_of_layer = {layer: index for index, group in enumerate(self.groups) for layer in group.layers}
        """Index of the group of each layer that stores keys and values."""
        self.has_states = any(spec.num_states for spec in self.layers)
        """Whether some layers are recurrent, whose states are in no page."""
        self._states: WeakSet[HoldsStates] = WeakSet()
        self._states_lock = threading.Lock()
        self.prefix_index = None
        if prefix_cache:
            if self.has_states and store is not None:
                raise ValueError(
                    f"A store was given for a {self.config.model_type!r} model, of which {recurrent_layer(config)} "
                    "that is in no page, so that nothing could go on from a prefix in it. Leave it out."
                )
            if self.has_encoder:
                raise ValueError(
                    f"prefix_cache=True was asked for, but this {self.config.model_type!r} model has an encoder, and "
                    "what its decoder makes of a prefix depends on the encoder's input. Leave it out."
                )
            tiers: dict[str, PageTier | None] = {"host": self.host, "store": written}
            present = {name: tier for name, tier in tiers.items() if tier is not None and not self.has_states}
            prefix_tiers = PrefixTiers(self.groups, present) if present else None
            self.prefix_index = PrefixIndex(self.groups, prefix_tiers, needs_states=self.has_states)
        elif store is not None:
            raise ValueError(
                "A store was given to a pool that finds no prefixes, which is what it would keep. Pass "
                "prefix_cache=True, or leave out the store."
            )

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        num_pages: int | None = None,
        page_size: int = 128,
        watermark: int = 0,
        *,
        memory_fraction: float | None = None,
        prefix_cache: bool = False,
        host_bytes: int = 0,
        store: PageTier | None = None,
    ) -> "PagePool":
        """Make a pool for a model, of a number of pages, or of a part of the memory that is free now.

        With `memory_fraction` the model computes one token, which shows how large its keys and values are. Layers with
        a window are counted as if they kept as many tokens as the others, so that the pool never takes more.

        Args:
            model: a decoder.
            num_pages: as for the class.
            page_size: as for the class.
            watermark: as for the class.
            memory_fraction: above 0 and below 1, of what is free on the devices of the model; the rest is for
                activations. Instead of `num_pages`.
            prefix_cache: as for the class.
            host_bytes: as for the class.
            store: as for the class.

        Raises:
            ValueError: for arguments that exclude each other or are out of range, a model with an encoder, or if not
                one page fits.
        """
        model = model_in(model, "PagePool.from_model()")
        config = model.config
        make = partial(cls, config, prefix_cache=prefix_cache, host_bytes=host_bytes, store=store)
        if memory_fraction is None:
            return make(num_pages, page_size, watermark)
        if num_pages is not None or not 0 < memory_fraction < 1:
            raise ValueError(
                f"num_pages={num_pages} and memory_fraction={memory_fraction} were asked for, but one of them is "
                "needed, and a fraction is above 0 and below 1."
            )
        pool = cls(config, None, page_size, watermark)
        if pool.has_encoder:
            raise ValueError(
                f"memory_fraction was given for a {type(model).__name__}, but how large the keys of a model with an "
                "encoder are is not known before it has an input. Pass num_pages."
            )
        fitting = [
            int(memory_fraction * free_bytes(device)) // (size * pool.page_size)
            for device, size in token_bytes_by_device(model).items()
        ]
        if min(fitting) < 1:
            raise ValueError(
                f"memory_fraction={memory_fraction} of the free memory has room for no page of {page_size} tokens. "
                "Free some, or ask for more of it."
            )
        return make(min(fitting), page_size, watermark)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(
                f"A PagePool was asked for its {name!r}, which it does not have. Where a cache is wanted, as by "
                "generate(), make one that holds pages of it: PagedCache(pool=pool)."
            )

    @property
    def num_pages(self) -> int:
        """Pages that exist in all groups, held or free."""
        return sum(group.num_pages for group in self.groups)

    def storage(self, layer: int) -> LayerStorage | None:
        """Storage of a layer; None before its first key."""
        return self.groups[self.group_of_layer[layer]].storage(layer)

    def any_storage(self) -> LayerStorage | None:
        """Storage of some layer; None before the first key of any."""
        return next((storage for group in self.groups for storage in group.storages()), None)

    def open_storage(self, layer: int, keys: Tensor, values: Tensor) -> LayerStorage:
        """Return the storage of a layer, made on the first call for keys and values like these.

        Raises:
            ValueError: if keys and values aren't dense or don't belong together, or head counts, head sizes, dtype or
                device differ from what the layer holds.
        """
        check_dense(keys)
        check_dense(values)
        storage = self.storage(layer)
        if storage is not None and storage.fits(keys, values):
            return storage
        if storage is None:
            check_surroundings()
        difference = disagreement(keys, values)
        if storage is None and difference is None:
            storage = self.groups[self.group_of_layer[layer]].open_storage(layer, keys, values)
        if storage is None or (difference := difference or storage.mismatch(keys, values)) is not None:
            raise ValueError(
                f"Layer {layer} was given {difference}. One pool serves one model on one device in one dtype: "
                "make a new PagedCache for this model."
            )
        return storage

    def trim(self) -> None:
        """Give memory back: drop the free pages behind the last held one. What was reserved at once stays."""
        for group in self.groups:
            group.trim()

    def stats(self) -> MemoryStats:
        """Account for the pages and bytes of every cache on this pool."""
        swapped_bytes = 0 if self.host is None else self.host.set_aside_bytes
        with self._states_lock:
            states = list(self._states)
        stats = self.account([group.holders() for group in self.groups], states, swapped_bytes)
        tiers = None if self.prefix_index is None else self.prefix_index.tiers
        if tiers is None:
            return stats
        return replace(
            stats,
            host_bytes=0 if self.host is None else self.host.num_bytes,
            store_bytes=0 if self.store is None else self.store.num_bytes,
            num_demoted_pages=tiers.num_demoted_pages,
            num_promoted_pages=tiers.num_promoted_pages,
        )

    def count_in(self, states: HoldsStates) -> None:
        """Account for the states of recurrent layers, too, as long as somebody has them."""
        with self._states_lock:
            self._states.add(states)

    def account(
        self, holders: Sequence[Sequence[PageHolder]], states: Sequence[HoldsStates] = (), swapped_bytes: int = 0
    ) -> MemoryStats:
        """Account for what `holders`, given for each group, hold, beside states and what they have on the host."""
        num_active = num_shared = active_bytes = live_bytes = shared_bytes = padded_bytes = num_unique = 0
        for group, members in zip(self.groups, holders, strict=True):
            used: dict[int, int] = {}
            num_stored = num_padded = 0
            for holder in members:
                for page, _, num_tokens in holder.held_pages():
                    used[page] = max(num_tokens, used.get(page, 0))
                    num_stored += num_tokens
                widest = int(holder.lengths.max(initial=0))
                # A contiguous cache keeps one token less than a window, before the next one is added.
                num_padded += len(holder.lengths) * (widest if group.window is None else min(widest, group.window - 1))
            num_distinct = sum(used.values())
            num_active += len(used)
            num_shared += sum(group.allocator.num_holders(page) > 1 for page in used)
            num_unique = max(num_unique, num_distinct)
            active_bytes += len(used) * self.page_size * group.token_bytes
            live_bytes += num_distinct * group.token_bytes
            shared_bytes += (num_stored - num_distinct) * group.token_bytes
            padded_bytes += num_padded * group.token_bytes
        index = self.prefix_index
        return MemoryStats(
            num_pages=self.num_pages,
            num_free_pages=sum(group.allocator.num_free for group in self.groups),
            num_cached_pages=sum(group.allocator.num_cached for group in self.groups),
            num_active_pages=num_active,
            num_shared_pages=num_shared,
            num_copied_pages=sum(group.num_copied_pages for group in self.groups),
            num_tokens=sum(int(holder.lengths.sum()) for holder in holders[0]) if holders else 0,
            num_unique_tokens=num_unique,
            page_size=self.page_size,
            token_bytes=sum(group.token_bytes for group in self.groups),
            active_bytes=active_bytes,
            live_bytes=live_bytes,
            shared_bytes=shared_bytes,
            reserved_bytes=sum(group.reserved_bytes for group in self.groups),
            padded_bytes=padded_bytes,
            num_looked_up_tokens=0 if index is None else index.num_looked_up_tokens,
            num_hit_tokens=0 if index is None else index.num_hit_tokens,
            num_evicted_pages=0 if index is None else index.num_evicted_pages,
            swapped_bytes=swapped_bytes,
            state_bytes=bytes_of_states(states),
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every page is free, cached or held, once, by exactly its holders."""
        for place, group in enumerate(self.groups):
            group.check_integrity({} if self.prefix_index is None else self.prefix_index.places(place))

    def forget_prefixes(self) -> None:
        """Let no prefix be found any more but in the store; the pages that nobody holds are free."""
        if self.prefix_index is not None:
            self.prefix_index.clear()
        if self.host is not None:
            self.host.clear()

    def store_prefixes(self) -> None:
        """Write all prefixes that can be found to the store, unless it has them, so that processes to come find them.

        Raises:
            ValueError: if there is no store.
        """
        index = self.prefix_index
        if self.store is None or index is None or index.tiers is None:
            raise ValueError(
                "store_prefixes() was called on a pool without a store. Make it by PagePool.from_model(model, "
                "num_pages=..., prefix_cache=True, store=PrefixStore(folder, max_bytes))."
            )
        if self.host is not None:
            for key, content in self.host.contents():
                self.store.put(key, content)
        for place, group in enumerate(self.groups):
            pages, rows = index.found(place)
            try:
                for first in range(0, len(pages), _STORED):
                    some = slice(first, first + _STORED)
                    index.tiers.copy(place, pages[some], rows[some], self.store)
            finally:
                group.allocator.release(pages[::-1])  # to be evicted in the same order as before


def check_config(config: PreTrainedConfig | None) -> PreTrainedConfig:
    """Return `config` if it is a model's configuration, else raise ValueError."""
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"A model's configuration is needed, but a {type(config).__name__} was given. Pass model.config, or call "
            "PagedCache.from_model(model)."
        )
    return config


def usual_page_size(device: torch.device) -> int:
    """Tokens per page where nobody says how many: small pages waste less, and a GPU wants large tiles."""
    return 32 if device.type == "cpu" else 128


def check_count(name: str, count: Any, least: int) -> int:
    """Return `count` if it is a whole number of at least `least`, else raise ValueError that names it."""
    if isinstance(count, bool) or not isinstance(count, Integral) or count < least:
        raise ValueError(f"{name}={count!r} was asked for, but a whole number of at least {least} is needed.")
    return int(count)


def check_page_size(page_size: int) -> int:
    """Return `page_size` if the kernel can take it, else raise ValueError."""
    if not isinstance(page_size, int) or page_size not in PAGE_SIZES:
        raise ValueError(
            f"page_size={page_size!r} was asked for, but a page must be a tile that the kernel can take: "
            f"choose one of {', '.join(map(str, PAGE_SIZES))}."
        )
    return page_size


def pool_for(
    config: PreTrainedConfig | None, num_pages: int | None, page_size: int | None, pool: PagePool | None
) -> PagePool:
    """Make a pool for a cache of a configuration, unless there is one."""
    if (config is None) == (pool is None):
        raise ValueError("PagedCache needs either a model's config or a pool, not both and not neither.")
    if pool is None:
        assert config is not None
        return PagePool(config, num_pages, 128 if page_size is None else page_size)
    if not isinstance(pool, PagePool):
        raise ValueError(
            f"pool was given a {type(pool).__name__}, but it takes a PagePool; another cache's is cache.pool."
        )
    if num_pages is not None or page_size is not None:
        raise ValueError(
            f"num_pages={num_pages} and page_size={page_size} were asked for beside a pool, which has "
            f"{pool.num_pages} pages of {pool.page_size} tokens. Give them to PagePool instead."
        )
    return pool
