"""How much memory the caches get, and how convolution and attention share it.

A request with N new tokens owns `ceil((N - 1) / page_len)` convolution pages, each of
`convolution_layers * width * page_len` numbers of the filters' dtype (full form: `width * 2 *
num_filters` for `width`), whatever its prompt's length, and pages of its attention window, at most
`ceil(window_tokens / page_len) + 1`, each of `attn_layers * 2 * page_len * width` numbers of the
weights' dtype. Two pages more for each of `max_running` rows hold the pages that rows are in, and
with short convolutions `channels * (taps - 1)` numbers of the weights' dtype each of their layers.
"""

import math
from dataclasses import dataclass

import psutil
import torch

from serve.cache.attention_windows import AttentionCache, window_pages
from serve.cache.page_pool import PagePool, Pages, pages_for
from serve.cache.paged_futurefill import ConvolutionCache
from serve.cache.recent_inputs import RecentInputs
from serve.config import INVARIANT_ROWS, EngineConfig
from stu.config import ModelConfig
from stu.mixers import KeyWindow, LastInputs, PastInputs, remembered
from stu.model import FlashSTU

GIB = 2**30
DEFAULT_SHARE = 0.5
"""Of the free memory, where no size is given."""


@dataclass(frozen=True)
class Caches:
    """All caches, and the pools that two of them take their pages from."""

    convolution: ConvolutionCache
    """Of no layers, for a model of attention alone."""
    attention: AttentionCache | None
    """None for a model without attention."""
    recent: RecentInputs | None
    """None for a model without short convolutions."""
    pools: tuple[PagePool, PagePool | None]

    @property
    def capacity(self) -> Pages:
        """Pages that requests can own."""
        convolution, attention = self.pools
        return Pages(convolution.capacity, attention.capacity if attention else 0)

    def free(self) -> Pages:
        """Pages that nobody owns or was promised."""
        convolution, attention = self.pools
        if attention is None or self.attention is None:
            return Pages(convolution.num_free, 0)
        return Pages(convolution.num_free, attention.capacity - self.attention.num_promised)

    def owned(self, owner: int) -> Pages:
        """Pages that `owner` has or was promised."""
        convolution = len(self.pools[0].pages_of(owner))
        return Pages(convolution, self.attention.promised_to(owner) if self.attention else 0)


def make_caches(model: FlashSTU, config: EngineConfig) -> Caches:
    """Allocate the caches for `model`. Raises ValueError if not even a short request fits."""
    shape, weight = model.config, model.embedding.weight
    dtype, device = weight.dtype, weight.device
    taps, lag_step = model.convolution_taps()
    if not taps.isfinite().all():
        raise ValueError(
            "the model's convolution filters are not finite: its weights are damaged; try another "
            "checkpoint"
        )
    num_rows, page_len = _num_rows(config), config.page_len
    short = remembered(model.mixers, LastInputs)
    recent = RecentInputs(short, num_rows, dtype, device) if short else None
    past = remembered(model.mixers, PastInputs) or [PastInputs(shape.width)]
    convolution_shape = len(taps), page_len, past[0].channels * past[0].streams
    windows = remembered(model.mixers, KeyWindow)
    attention_shape = len(windows), 2, page_len, shape.num_heads, shape.head_dim
    page_bytes = Pages(
        math.prod(convolution_shape) * model.filters.element_size(),
        math.prod(attention_shape) * weight.element_size(),
    )
    row_bytes = 2 * num_rows * page_bytes.convolution + (recent.num_bytes if recent else 0)
    window = windows[0] if windows else None
    num_pages = _num_pages(
        shape, window, config, _budget_bytes(config, device), page_bytes, row_bytes
    )
    convolution = PagePool(num_pages.convolution, convolution_shape, model.filters.dtype, device)
    convolutions = ConvolutionCache(taps, lag_step, convolution, num_rows)
    if window is None:
        return Caches(convolutions, None, recent, (convolution, None))
    attention = PagePool(num_pages.attention, attention_shape, dtype, device)
    attentions = AttentionCache(window, attention)
    return Caches(convolutions, attentions, recent, (convolution, attention))


def _num_pages(
    shape: ModelConfig,
    window: KeyWindow | None,
    config: EngineConfig,
    num_bytes: int,
    page_bytes: Pages,
    row_bytes: int,
) -> Pages:
    """Pages of both kinds, null pages included, for equally many requests of the usual length.

    row_bytes: what all rows take besides.
    """
    page_len, (convolution_bytes, attention_bytes) = config.page_len, page_bytes
    usual = config.expected_new_tokens or max(1, shape.max_seq_len // 2)
    per_request = Pages(
        pages_for(min(usual, shape.max_seq_len), page_len),
        min(pages_for(shape.max_seq_len, page_len), window_pages(window, page_len))
        if window
        else 0,
    )
    null_pages = convolution_bytes + attention_bytes
    request_bytes = (
        per_request.convolution * convolution_bytes + per_request.attention * attention_bytes
    )
    least = row_bytes + null_pages + convolution_bytes + per_request.attention * attention_bytes
    if num_bytes < least:
        raise ValueError(
            f"cache_gib={num_bytes / GIB:.4g} is too little: {config.max_running} rows take "
            f"{row_bytes / GIB:.4g} and one short request {(least - row_bytes) / GIB:.4g}; give at "
            f"least {least / GIB:.4g}, or lower max_running or page_len"
        )
    requests = (num_bytes - row_bytes - null_pages) / request_bytes
    attention_pages = max(per_request.attention, int(requests * per_request.attention))
    attention_pages = min(attention_pages, config.max_running * per_request.attention)
    if not convolution_bytes:
        return Pages(2, attention_pages + 1)  # as few as a pool can have
    left = num_bytes - row_bytes - null_pages - attention_pages * attention_bytes
    most = config.max_running * pages_for(shape.max_seq_len, page_len)
    convolution_pages = max(1, min(most, left // convolution_bytes))
    return Pages(convolution_pages + 1, attention_pages + 1)


def _num_rows(config: EngineConfig) -> int:
    """Of rings and recent inputs: where rows go in groups, the last group may be padded."""
    at_once = INVARIANT_ROWS if config.batch_invariant else 1
    return -(-config.max_running // at_once) * at_once


def _budget_bytes(config: EngineConfig, device: torch.device) -> int:
    if config.cache_gib is not None:
        return int(config.cache_gib * GIB)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    return int(DEFAULT_SHARE * free)
