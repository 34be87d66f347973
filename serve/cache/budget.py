"""The caches of an engine, and how they share its memory.

Caches with pages share what the rows leave over, so that equally many requests of the usual length
find room in each. What a page and a row of a cache take is stated in its own file.
"""

from dataclasses import dataclass
from typing import cast

import psutil
import torch

from serve.cache.attention_windows import AttentionCache
from serve.cache.base import Cache, CacheSize
from serve.cache.page_pool import PagePool, Pages
from serve.cache.paged_futurefill import ConvolutionCache
from serve.cache.recent_inputs import RecentInputs
from serve.config import EngineConfig
from stu.common.errors import UserError, setting_name
from stu.mixers import KeyWindow, LastInputs, PastInputs, Remembered
from stu.model import FlashSTU

GIB = 2**30
DEFAULT_SHARE = 0.5
"""Share of the free memory that caches take if no size is set."""
CACHES: dict[type[Remembered], type[Cache]] = {
    KeyWindow: AttentionCache,
    LastInputs: RecentInputs,
    PastInputs: ConvolutionCache,
}
"""Caches by the kind of memory that they hold. The last one with pages gets what the others leave
over."""


@dataclass(frozen=True)
class Caches:
    """The caches of a model."""

    by_kind: dict[type[Remembered], Cache]
    """Caches of the kinds of memory that the model has."""

    @property
    def convolution(self) -> ConvolutionCache:
        """Cache of long convolutions, of no layers in a model without any."""
        return cast(ConvolutionCache, self.by_kind[PastInputs])

    @property
    def attention(self) -> AttentionCache | None:
        """Cache of attention windows."""
        return cast(AttentionCache | None, self.by_kind.get(KeyWindow))

    @property
    def recent(self) -> RecentInputs | None:
        """Cache of short convolutions."""
        return cast(RecentInputs | None, self.by_kind.get(LastInputs))

    @property
    def pools(self) -> tuple[PagePool, PagePool | None]:
        """Pools of convolution and attention pages."""
        return self.convolution.pool, self.attention.pool if self.attention else None

    @property
    def capacity(self) -> Pages:
        """Numbers of pages that requests can own."""
        return Pages(*(pool.capacity if pool else 0 for pool in self.pools))

    def free(self) -> Pages:
        """Return the pages that nobody owns or has been promised."""
        return Pages(*(cache.num_free if cache else 0 for cache in self._paged))

    def owned(self, owner: int) -> Pages:
        """Return the pages that `owner` has or has been promised."""
        return Pages(*(cache.owned(owner) if cache else 0 for cache in self._paged))

    def needed(self, prompt_tokens: int, new_tokens: int) -> Pages:
        """Return the pages that a sequence owns, or may come to own."""
        return Pages(
            *(
                cache.pages_needed(prompt_tokens, new_tokens) if cache else 0
                for cache in self._paged
            )
        )

    @property
    def _paged(self) -> tuple[Cache, Cache | None]:
        return self.convolution, self.attention


def make_caches(model: FlashSTU, config: EngineConfig) -> Caches:
    """Allocate the caches of `model`. Raises UserError if not even a short request fits."""
    sizes = {kind: cache.size(model, config) for kind, cache in CACHES.items()}
    needed = {kind: size for kind, size in sizes.items() if size is not None}
    num_pages = _num_pages(needed, config, _budget_bytes(config, model.embedding.weight.device))
    return Caches({kind: CACHES[kind].make(model, config, num_pages[kind]) for kind in needed})


def _num_pages(
    sizes: dict[type[Remembered], CacheSize], config: EngineConfig, num_bytes: int
) -> dict[type[Remembered], int]:
    """Return the pages of each cache, the null page included."""
    fixed = sum(size.fixed_bytes for size in sizes.values())
    null_pages = sum(size.page_bytes for size in sizes.values())
    shortest = sum(size.least_pages * size.page_bytes for size in sizes.values())
    least = fixed + null_pages + shortest
    if num_bytes < least:
        raise UserError(
            "cache_gib",
            message=f"{setting_name('cache_gib')}={num_bytes / GIB:.4g} is too little: "
            f"{config.max_running} rows take {fixed / GIB:.4g} and one short request "
            f"{(least - fixed) / GIB:.4g}; give at least {least / GIB:.4g}, or lower "
            f"{setting_name('max_running')} or {setting_name('page_len')}",
        )
    left = num_bytes - fixed - null_pages
    paged = {kind: size for kind, size in sizes.items() if size.page_bytes}
    usual = sum(size.usual_pages * size.page_bytes for size in paged.values())
    requests = left / usual if usual else 0
    pages = dict.fromkeys(sizes, 1)  # as few as a pool can have
    for i, (kind, size) in enumerate(paged.items()):
        is_last = i + 1 == len(paged)
        count = left // size.page_bytes if is_last else int(requests * size.usual_pages)
        most = config.max_running * (size.most_pages if is_last else size.usual_pages)
        pages[kind] = max(size.least_pages, min(most, count))
        left -= pages[kind] * size.page_bytes
    return {kind: count + 1 for kind, count in pages.items()}


def _budget_bytes(config: EngineConfig, device: torch.device) -> int:
    if config.cache_gib is not None:
        return int(config.cache_gib * GIB)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    return int(DEFAULT_SHARE * free)
