"""Sliding-window attention with softcap and ALiBi: the mixer, and its scores on GPU and CPU.

The score of query i and key j is `softcap * tanh(q.k / sqrt(head_dim) / softcap)
- slope * (i - j)` for `i - window_tokens <= j <= i`, in the order of flash-attn.
"""

import functools
import importlib.util
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stu.config import ModelConfig
from stu.flash_attention import flash_attention, flash_stand_in
from stu.layers import Costs
from stu.mixers import KeyWindow, WindowAttention
from stu.sequences.base import Sequences
from stu.sequences.documents import Documents
from stu.slices.channels import ChannelRanks, Divided

logger = logging.getLogger(__name__)

KERNEL_ON_CUDA = next(
    (
        kernel
        for module, kernel in {"flash_attn": "flash-attn", "triton": "flex_attention"}.items()
        if importlib.util.find_spec(module) is not None
    ),
    "blocked torch code",
)
"""Code that attends over whole sequences of 16-bit tensors on CUDA, the best that is installed."""
QUERY_BLOCK = 128
"""Queries that the torch code attends from at once."""
FLASH_MOST_HEAD_DIM = 256
"""Wider heads are not taken by flash-attn."""
FLEX_LEAST_TOKENS, FLEX_LEAST_HEAD_DIM = 256, 16
"""Shorter sequences are one or two blocks, not worth a kernel; narrower heads it does not take."""


class SlidingWindowAttention(WindowAttention):
    """Causal attention to the last `window_tokens` tokens, with fused projections and no bias."""

    stacked_matrices = (("qkv.weight", 3),)
    summed = ("output",)

    def __init__(self, config: ModelConfig) -> None:
        window, softcap = config.window_tokens, config.softcap
        super().__init__(KeyWindow(window, config.num_heads, config.head_dim, softcap))
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self._imitates_flash = False
        _log_kernel()

    def forward(self, x: Tensor, filters: Tensor, sequences: Sequences) -> Tensor:
        heads = self.window.num_heads, self.window.head_dim
        # [B, T, D] -> three of [B, T, heads, head_dim]
        queries, keys, values = self.qkv(x).unflatten(-1, (3, *heads)).unbind(2)
        attended = sequences.attend(self, queries, keys, values)
        projected: Tensor = self.output(attended.flatten(2))
        return projected

    def attended(
        self, queries: Tensor, keys: Tensor, values: Tensor, documents: Documents | None = None
    ) -> Tensor:
        attend = flash_stand_in if self._imitates_flash else sliding_window_attention
        return attend(queries, keys, values, window_scores(self.window, queries.device), documents)

    def initialize(self, depth_scale: float) -> None:
        nn.init.xavier_normal_(self.qkv.weight)
        nn.init.xavier_normal_(self.output.weight, gain=depth_scale)

    def training_costs(self, seq_len: int, micro_batch_size: int) -> tuple[Costs, Costs]:
        forward, backward = super().training_costs(seq_len, micro_batch_size)
        keys = sum(min(i, self.window.window_tokens) + 1 for i in range(seq_len)) / seq_len
        flops = 4.0 * keys * self.window.num_heads * self.window.head_dim
        # The backward pass computes the scores again.
        return forward + Costs(attention=flops), backward + Costs(attention=2.5 * flops)

    @property
    def divided(self) -> dict[str, Divided]:
        return {"qkv.weight": Divided(0, groups=3), "output.weight": Divided(1)}

    def take_part(self, ranks: ChannelRanks) -> None:
        super().take_part(ranks)
        count, own = self.window.num_heads, ranks.own(self.window.num_heads)
        heads = {"num_heads": own.stop - own.start, "first_head": own.start, "all_heads": count}
        self.window = replace(self.window, **heads)
        self.remembers = (self.window,)

    def imitate_gpu(self, is_half: bool) -> None:
        self._imitates_flash = is_half


class Scores(NamedTuple):
    """Scores of the keys in a window."""

    slopes: Tensor
    """ALiBi's slope of each head, `[heads]`."""
    window_tokens: int
    softcap: float


def window_scores(window: KeyWindow, device: torch.device) -> Scores:
    """Return the scores of a window, whose heads may be some of a layer's."""
    slopes = alibi_slopes(window.all_heads or window.num_heads)
    own = slopes[window.first_head : window.first_head + window.num_heads].to(device)
    return Scores(own, window.window_tokens, window.softcap)


def alibi_slopes(num_heads: int) -> Tensor:
    """Return one slope per head, `[num_heads]` float32, times 0.25 (Press et al. 2022,
    arXiv:2108.12409).

    They are `s^1 .. s^heads` with `s = 2^(-8 / heads)` for a power of two of heads; otherwise those
    of the next lower power of two, then every second one of the next higher power.
    """
    below = 2 ** int(math.log2(num_heads))
    slopes = _geometric(below) + _geometric(2 * below)[0::2][: num_heads - below]
    return 0.25 * torch.tensor(slopes, dtype=torch.float32)


def sliding_window_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: Scores,
    documents: Documents | None = None,
) -> Tensor:
    """Attend from each token to itself and to `window_tokens` before it, in its own document if
    `documents` are given.

    Queries and the result are `[B, T, heads, head_dim]`. Keys and values are of the same tokens,
    and may begin with those of earlier ones. 16-bit tensors on CUDA go through flash-attn where it
    is installed, and elsewhere, unless they are short, through flex_attention. All others, and
    heads too wide for flash-attn, go through blocks of queries in float32, `O(T * window)` in time.
    """
    half = queries.dtype in (torch.float16, torch.bfloat16)
    kernel = KERNEL_ON_CUDA if queries.is_cuda and half else ""
    is_small = keys.shape[1] < FLEX_LEAST_TOKENS or keys.shape[3] < FLEX_LEAST_HEAD_DIM
    if kernel == "flex_attention" and not is_small:
        from stu.flex_attention import flex_window_attention  # which imports torch's compiler

        return flex_window_attention(queries, keys, values, scores, documents)
    if kernel == "flash-attn" and keys.shape[3] <= FLASH_MOST_HEAD_DIM:
        return flash_attention(queries, keys, values, scores, documents)
    if documents is not None:
        apart: Tensor = documents.apply(sliding_window_attention, (queries, keys, values), scores)
        return apart
    dtype = torch.promote_types(queries.dtype, torch.float32)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (queries, keys, values))  # [B, heads, T, hd]
    with torch.autocast(queries.device.type, enabled=False):
        blocked: Tensor = _BlockedAttention.apply(q, k, v, *scores)  # type: ignore[no-untyped-call]
    return blocked.transpose(1, 2).to(queries.dtype)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, distances: Tensor, scores: Scores
) -> Tensor:
    """Attend from queries `[B, heads, Q, hd]` to keys `[B, heads, K, hd]`: `[B, heads, Q, hd]`.

    distances: number of tokens by which each key precedes each query, `[Q, K]` or `[B, 1, Q, K]`;
    keys with a distance outside `0..window_tokens` are masked. Sums are in the arguments' dtype.
    """
    bias = _bias(distances, scores.slopes, scores.window_tokens, queries.dtype)
    return _weights(queries, keys, bias, scores.softcap)[0] @ values


class _BlockedAttention(torch.autograd.Function):
    """Attention over `[B, heads, T, hd]`, `QUERY_BLOCK` queries at a time.

    It has gradients of its own: autograd's would span the sequence for every block and keep the
    scores, which are computed again here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        slopes: Tensor,
        window_tokens: int,
        softcap: float,
    ) -> Tensor:
        attended = torch.empty_like(queries)
        for block, seen, bias in _blocks(queries, keys, slopes, window_tokens):
            weights, _ = _weights(queries[:, :, block], keys[:, :, seen], bias, softcap)
            attended[:, :, block] = weights @ values[:, :, seen]
        ctx.save_for_backward(queries, keys, values, attended, slopes)
        ctx.window_tokens, ctx.softcap = window_tokens, softcap
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, attended, slopes = ctx.saved_tensors
        queries_grad = torch.empty_like(queries)
        keys_grad, values_grad = torch.zeros_like(keys), torch.zeros_like(values)
        scale = queries.shape[-1] ** -0.5
        for block, seen, bias in _blocks(queries, keys, slopes, ctx.window_tokens):
            own_queries, own_keys, own_grad = (
                queries[:, :, block],
                keys[:, :, seen],
                grad[:, :, block],
            )
            weights, bends = _weights(own_queries, own_keys, bias, ctx.softcap)
            values_grad[:, :, seen] += weights.transpose(-1, -2) @ own_grad
            scores_grad = own_grad @ values[:, :, seen].transpose(-1, -2)
            scores_grad -= (own_grad * attended[:, :, block]).sum(-1, keepdim=True)
            scores_grad *= weights
            scores_grad *= bends.square_().neg_().add_(1).mul_(scale)  # by q.k
            queries_grad[:, :, block] = scores_grad @ own_keys
            keys_grad[:, :, seen] += scores_grad.transpose(-1, -2) @ own_queries
        return queries_grad, keys_grad, values_grad, None, None, None


def _blocks(
    queries: Tensor, keys: Tensor, slopes: Tensor, window_tokens: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield blocks of queries, the keys that they see and the bias of their scores,
    `[heads, Q, K]`."""
    length, device = keys.shape[2], queries.device
    earlier = length - queries.shape[2]
    shape, bias = None, torch.empty(0)
    for start in range(earlier, length, QUERY_BLOCK):
        stop, first = min(start + QUERY_BLOCK, length), max(0, start - window_tokens)
        if shape != (stop - start, start - first):  # most blocks are alike
            shape = stop - start, start - first
            positions = torch.arange(first, stop, device=device)
            distances = positions[start - first :, None] - positions
            bias = _bias(distances, slopes, window_tokens, queries.dtype)
        yield slice(start - earlier, stop - earlier), slice(first, stop), bias


def _bias(distances: Tensor, slopes: Tensor, window_tokens: int, dtype: torch.dtype) -> Tensor:
    unseen = (distances < 0) | (distances > window_tokens)
    return (-slopes.to(dtype)[:, None, None] * distances).masked_fill(unseen, -math.inf)


def _weights(queries: Tensor, keys: Tensor, bias: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Return the softmax of the scores, and the tanh in them."""
    scale = queries.shape[-1] ** -0.5 / softcap
    bends = ((scale * queries) @ keys.transpose(-1, -2)).tanh_()
    return torch.add(bias, bends, alpha=softcap).softmax(dim=-1), bends


def _geometric(num_heads: int) -> list[float]:
    return [2.0 ** (-8.0 * (head + 1) / num_heads) for head in range(num_heads)]


@functools.cache
def _log_kernel() -> None:
    if torch.cuda.is_available():
        logger.info("attention on CUDA runs %s", KERNEL_ON_CUDA)
