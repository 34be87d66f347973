"""Sliding-window attention scores: softcap, ALiBi and a window, on GPU and CPU.

The score of query i and key j is `softcap * tanh(q.k / sqrt(head_dim) / softcap)
- slope * (i - j)`, for `i - window_tokens <= j <= i`: flash-attn's order of the two.
"""

import functools
import importlib.util
import logging
import math

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

QUERY_BLOCK = 128


def alibi_slopes(num_heads: int) -> Tensor:
    """One slope per head, `[num_heads]` float32 (Press et al. 2022), times 0.25.

    `s^1 .. s^heads` with `s = 2^(-8 / heads)` for a power of two of heads; otherwise those of the
    power of two below, then every second one of the power above.
    """
    below = 2 ** int(math.log2(num_heads))
    slopes = _geometric(below) + _geometric(2 * below)[0::2][: num_heads - below]
    return 0.25 * torch.tensor(slopes, dtype=torch.float32)


def sliding_window_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    slopes: Tensor,
    window_tokens: int,
    softcap: float,
) -> Tensor:
    """Causal attention of each token to itself and `window_tokens` before it.

    All of `[B, T, heads, head_dim]`; slopes `[heads]`. Runs flash-attn for 16-bit tensors on CUDA
    where it is installed, and otherwise blocks of queries in float32, `O(T * window)` in memory.
    """
    half = queries.dtype in (torch.float16, torch.bfloat16)
    if queries.is_cuda and half and _flash_attention_is_installed():
        from flash_attn import flash_attn_func

        attended: Tensor = flash_attn_func(
            queries,
            keys,
            values,
            causal=True,
            window_size=(window_tokens, 0),
            softcap=softcap,
            alibi_slopes=slopes.float(),
        )
        return attended
    dtype = torch.promote_types(queries.dtype, torch.float32)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (queries, keys, values))  # [B, heads, T, hd]
    length = q.shape[2]
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop, first = min(start + QUERY_BLOCK, length), max(0, start - window_tokens)
        positions = torch.arange(first, stop, device=q.device)
        distances = positions[start - first :, None] - positions  # [queries, keys]
        blocks.append(
            attend(
                q[:, :, start:stop],
                k[:, :, first:stop],
                v[:, :, first:stop],
                distances,
                slopes,
                window_tokens,
                softcap,
            )
        )
    return torch.cat(blocks, dim=2).transpose(1, 2).to(queries.dtype)


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    distances: Tensor,
    slopes: Tensor,
    window_tokens: int,
    softcap: float,
) -> Tensor:
    """Attention of queries `[B, heads, Q, hd]` to keys `[B, heads, K, hd]`: `[B, heads, Q, hd]`.

    distances: how many tokens each key lies before each query, `[Q, K]` or `[B, 1, Q, K]`; keys
    with a distance outside `0..window_tokens` are not seen. Sums in the dtype of the arguments.
    """
    scores = queries @ keys.transpose(-1, -2) / (math.sqrt(queries.shape[-1]) * softcap)
    bias = slopes.to(scores.dtype)[:, None, None] * distances
    unseen = (distances < 0) | (distances > window_tokens)
    scores = (softcap * scores.tanh() - bias).masked_fill(unseen, -math.inf)
    return scores.softmax(dim=-1) @ values


def _geometric(num_heads: int) -> list[float]:
    return [2.0 ** (-8.0 * (head + 1) / num_heads) for head in range(num_heads)]


@functools.cache
def _flash_attention_is_installed() -> bool:
    installed = importlib.util.find_spec("flash_attn") is not None
    logger.info("attention on CUDA runs %s", "flash-attn" if installed else "blocked torch code")
    return installed
