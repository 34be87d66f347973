"""The caches of an engine, and how they share its memory.

Caches with pages share what the rows leave over, so that equally many requests of the usual length
find room in each. What a page and a row of a cache take is stated in its own file.
"""

import logging
from dataclasses import dataclass, replace
from typing import cast

import psutil
import torch

from serve.cache.alternating_states import AlternatingStates
from serve.cache.attention_windows import AttentionCache
from serve.cache.base import (
    Cache,
    CachePlan,
    CannotHold,
    ConvolutionCacheInfo,
    num_rows,
)
from serve.cache.mixed_states import MixedStates
from serve.cache.page_pool import Pages
from serve.cache.paged_futurefill import PagedFutureFill
from serve.cache.recent_inputs import RecentInputs
from serve.cache.spectral_state import SpectralStates
from serve.config import EngineConfig
from serve.kernels.narrow_product import MOST_ROWS, MOST_SPLITS
from serve.sampling.sampler import NUMBERS_ON_DEVICE
from serve.sampling.tables import table_bytes
from stu.common.errors import UserError, setting_name
from stu.common.machine import allowed_bytes
from stu.decoding.memory import CacheSize
from stu.mixers import KeyWindow, LastInputs, PastInputs, Remembered, remembered
from stu.model import FlashSTU
from stu.quantization import rounded_bytes

logger = logging.getLogger(__name__)

GIB = 2**30
DEFAULT_SHARE = 0.5
"""Share of the free memory that caches take if no size is set."""
SAMPLER_TENSORS = 10
"""Tensors in 64 bits over the vocabulary that a captured step of the sampler needs at once."""
PREFIX_SHARE = 0.25
"""Most of the caches' memory that the prefix cache takes if no size is set for it."""
CACHES: dict[type[Remembered], tuple[type[Cache], ...]] = {
    KeyWindow: (AttentionCache,),
    LastInputs: (RecentInputs,),
    PastInputs: (MixedStates, AlternatingStates, PagedFutureFill),
}
"""Caches by the kind of memory that they hold; the first that can hold a model's memory is used.
The last kind with pages gets what the others leave over."""


@dataclass(frozen=True)
class Caches:
    """The caches of a model."""

    by_kind: dict[type[Remembered], Cache]
    """Caches of the kinds of memory that the model has."""
    convolution_info: ConvolutionCacheInfo | None = None
    """The cache of long convolutions, as logs and metrics show it."""
    snapshot_bytes: int = 0
    """Bytes that snapshots may take besides pages; 0 if none are kept."""

    @property
    def convolution(self) -> SpectralStates | PagedFutureFill | None:
        """Cache of long convolutions."""
        return cast(SpectralStates | PagedFutureFill | None, self.by_kind.get(PastInputs))

    @property
    def attention(self) -> AttentionCache | None:
        """Cache of attention windows."""
        return cast(AttentionCache | None, self.by_kind.get(KeyWindow))

    @property
    def recent(self) -> RecentInputs | None:
        """Cache of short convolutions."""
        return cast(RecentInputs | None, self.by_kind.get(LastInputs))

    @property
    def grow(self) -> bool:
        """Whether a sequence needs more pages for more new tokens, however many it has."""
        return isinstance(self.convolution, PagedFutureFill)

    @property
    def take_chunks(self) -> bool:
        """Whether prompts may come in several chunks, and sequences continue from snapshots."""
        return all(cache.takes_chunks for cache in self.all)

    @property
    def all(self) -> list[Cache]:
        """The caches, in no particular order."""
        return list(self.by_kind.values())

    @property
    def capacity(self) -> Pages:
        """Numbers of pages that requests can own."""
        return Pages(*(cache.capacity if cache else 0 for cache in self._paged))

    @property
    def used(self) -> Pages:
        """Numbers of pages that requests own."""
        return Pages(*(cache.num_used if cache else 0 for cache in self._paged))

    def free(self) -> Pages:
        """Return the pages that nobody owns or has been promised."""
        return Pages(*(cache.num_free if cache else 0 for cache in self._paged))

    def owned(self, row: int) -> Pages:
        """Return the pages that `row` has or has been promised."""
        return Pages(*(cache.owned(row) if cache else 0 for cache in self._paged))

    def needed(self, prompt_tokens: int, new_tokens: int) -> Pages:
        """Return the pages that a sequence owns, or may come to own."""
        return Pages(
            *(
                cache.pages_needed(prompt_tokens, new_tokens) if cache else 0
                for cache in self._paged
            )
        )

    @property
    def _paged(self) -> tuple[Cache | None, Cache | None]:
        return self.convolution, self.attention


def make_caches(model: FlashSTU, config: EngineConfig) -> Caches:
    """Allocate the caches of `model`. Raises UserError if not even a short request fits, or the
    model's filters are not finite."""
    plans = {kind: cache_plan(kind, model, config) for kind in CACHES}
    made = {kind: plan for kind, plan in plans.items() if plan is not None}
    sizes = {kind: plan.size for kind, plan in made.items()}
    num_bytes = _budget_bytes(model, config)
    num_pages, snapshot_bytes = _divide(sizes, config, num_bytes)
    info = made[PastInputs].info if PastInputs in made else None
    by_kind = {kind: plan.make(num_pages[kind]) for kind, plan in made.items()}
    caches = Caches(by_kind, info, snapshot_bytes)
    if info is not None:
        logger.info("long convolutions are cached as %s", info)
    logger.info("prefixes of prompts: %s", _prefixes_in_words(caches, config))
    return caches


def _prefixes_in_words(caches: Caches, config: EngineConfig) -> str:
    if not caches.take_chunks:
        return "not remembered, as long convolutions are cached in pages"
    if config.prefix_cache_gib == 0:
        return f"not remembered, as {setting_name('prefix_cache_gib')}=0"
    if not caches.snapshot_bytes:
        return f"not remembered, as {setting_name('cache_gib')} leaves no room for them"
    shared = ", and spare pages of attention" if caches.attention else ""
    return f"remembered in {caches.snapshot_bytes / GIB:.3g} GiB of snapshots{shared}"


def cache_plan(kind: type[Remembered], model: FlashSTU, config: EngineConfig) -> CachePlan | None:
    """Return the plan of the first cache that can hold this kind of the model's memory."""
    wanted = config.convolution_cache
    reasons = ["convolution_cache=pages"] if wanted == "pages" else []
    for cache in CACHES[kind]:
        unwanted = {"pages": SpectralStates, "state": PagedFutureFill}.get(wanted or "")
        if unwanted and issubclass(cache, unwanted):
            continue
        try:
            plan = cache.plan(model, config)
        except CannotHold as reason:
            reasons.append(str(reason))
            continue
        if plan is not None and plan.info and cache is PagedFutureFill:
            return replace(plan, info=replace(plan.info, reason=" and ".join(reasons)))
        return plan
    raise UserError(
        "convolution_cache",
        message=f"convolution_cache=state is not possible for this model: {' and '.join(reasons)}; "
        "choose pages, or leave it out",
    )


def _divide(
    sizes: dict[type[Remembered], CacheSize], config: EngineConfig, num_bytes: int
) -> tuple[dict[type[Remembered], int], int]:
    """Divide the memory between rows and the prefix cache. Return the pages of each cache, and the
    bytes of snapshots besides their pages. By default snapshots get what rows leave over."""
    wanted = config.prefix_cache_gib
    for_prefixes = int((wanted or 0) * GIB)
    name = setting_name("prefix_cache_gib")
    have_snapshots = all(size.snapshot_bytes for size in sizes.values())
    if for_prefixes and not have_snapshots:
        raise UserError(
            "prefix_cache_gib",
            message=f"{name}={wanted:.4g} is not possible: this model's long convolutions are "
            "cached in pages, and cannot continue from a remembered prefix; leave it out",
        )
    if for_prefixes >= num_bytes:
        raise UserError(
            "prefix_cache_gib",
            message=f"{name}={wanted:.4g} is not less than all memory of caches, of which it is a "
            f"part: lower it, or raise {setting_name('cache_gib')}={num_bytes / GIB:.4g}",
        )
    pages = _num_pages(sizes, config, num_bytes - for_prefixes)
    if wanted is None and have_snapshots:
        taken = sum(
            size.fixed_bytes + pages[kind] * size.page_bytes for kind, size in sizes.items()
        )
        for_prefixes = min(int(PREFIX_SHARE * num_bytes), num_bytes - taken)
    paged = sum(size.snapshot_pages * size.page_bytes for size in sizes.values())
    one = sum(size.snapshot_bytes for size in sizes.values()) + paged
    count = for_prefixes // one if have_snapshots and one else 0
    if wanted and not count:
        raise UserError(
            "prefix_cache_gib",
            message=f"{name}={wanted:.4g} is too little for one prefix, which takes "
            f"{one / GIB:.4g}: raise it, or give 0",
        )
    pages = {kind: pages[kind] + count * size.snapshot_pages for kind, size in sizes.items()}
    return pages, for_prefixes - count * paged if count else 0


def _num_pages(
    sizes: dict[type[Remembered], CacheSize], config: EngineConfig, num_bytes: int
) -> dict[type[Remembered], int]:
    """Return the pages of each cache, without the null page."""
    fixed = sum(size.fixed_bytes for size in sizes.values())
    shortest = sum(size.least_pages * size.page_bytes for size in sizes.values())
    least = fixed + shortest
    if num_bytes < least:
        raise UserError(
            "cache_gib",
            message=f"{setting_name('cache_gib')}={num_bytes / GIB:.4g} is too little: "
            f"{config.max_running} rows take {fixed / GIB:.4g} and one short request "
            f"{(least - fixed) / GIB:.4g}; give at least {least / GIB:.4g}, or lower "
            f"{setting_name('max_running')} or {setting_name('page_len')}",
        )
    left = num_bytes - fixed
    paged = {kind: size for kind, size in sizes.items() if size.page_bytes}
    usual = sum(size.usual_pages * size.page_bytes for size in paged.values())
    shared = left
    pages = dict.fromkeys(sizes, 1)  # as few as a cache can have
    for i, (kind, size) in enumerate(paged.items()):
        is_last = i + 1 == len(paged)
        count = left // size.page_bytes if is_last else shared * size.usual_pages // usual
        most = config.max_running * (size.most_pages if is_last else size.usual_pages)
        pages[kind] = max(size.least_pages, min(most, count))
        left -= pages[kind] * size.page_bytes
    return pages


def _budget_bytes(model: FlashSTU, config: EngineConfig) -> int:
    device = model.embedding.weight.device
    if config.cache_gib is not None:
        return int(config.cache_gib * GIB)
    free = free_bytes(device) - other_bytes(model, config)
    if device.type == "cuda" and not config.enforce_eager:
        free -= graph_bytes(model, config)
    if model.ranks is not None:  # all have as many pages; those of a CPU share its memory
        free = model.ranks.smallest(free // (1 if device.type == "cuda" else model.num_ranks))
    return int(DEFAULT_SHARE * max(0, free))


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a device's memory that tensors can take. What torch keeps of freed ones
    counts too."""
    if device.type != "cuda":
        return int(min(psutil.virtual_memory().available, allowed_bytes()))
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def other_bytes(model: FlashSTU, config: EngineConfig) -> int:
    """Return the bytes that an engine may come to take besides caches and graphs: those of the
    sampler's tables, and of matrices that it rounds to 8 bits on CUDA, such as the unembedding."""
    shape, weights = model.config, config.weights or model.weights
    num_bytes = table_bytes(num_rows(config), shape.vocab_size, shape.max_seq_len)
    if weights != "float" and model.embedding.weight.device.type == "cuda":
        num_bytes += -(-shape.vocab_size // model.num_ranks) * (shape.width + 4)  # with its scales
        num_bytes += rounded_bytes(model, model.matrices, weights)
    return num_bytes


def graph_bytes(model: FlashSTU, config: EngineConfig) -> int:
    """Return about how many bytes CUDA graphs take: temporaries of the largest batch, for all."""
    shape, weight = model.config, model.embedding.weight
    width, hidden = shape.width, shape.mlp_ratio * shape.width // model.num_ranks
    rows, vocab_size = num_rows(config), shape.vocab_size
    num_bytes = rows * (2 * vocab_size + 3 * hidden + 16 * width) * weight.element_size()
    if (config.weights or model.weights) != "float":
        num_bytes += rows * width * MOST_SPLITS * 4  # sums, which are joined in float32
        if rows > MOST_ROWS:  # a copy of the largest matrix
            num_bytes += max(2 * hidden, len(weight)) * width * weight.element_size()
    sampled = min(rows * vocab_size, max(vocab_size, NUMBERS_ON_DEVICE))
    num_bytes += SAMPLER_TENSORS * sampled * 8
    if any(past.basis == "alternating" for past in remembered(model.mixers, PastInputs)):
        streams = width // model.num_ranks  # with outputs of two signals, which are copied once
        num_bytes += 2 * rows * streams * 2 * shape.num_filters * weight.element_size()
    return num_bytes
