"""Attention to the whole context with rotary positions, as Llama has it (Su et al. 2021,
arXiv:2104.09864): the peer of the mixers of stu in `python -m benchmarks quality`."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stu.attention import SlidingWindowAttention
from stu.sequences.documents import Documents

BASE = 10_000.0


class RopeAttention(SlidingWindowAttention):
    """The same projections; no window, no bound on scores, and positions by rotation. It does not
    decode."""

    def attended(
        self, queries: Tensor, keys: Tensor, values: Tensor, documents: Documents | None = None
    ) -> Tensor:
        if documents is not None:
            raise NotImplementedError("this peer mixes whole sequences")
        q, k, v = (x.transpose(1, 2) for x in (rotated(queries), rotated(keys), values))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, heads, T, hd]
        return mixed.transpose(1, 2)


def rotated(x: Tensor) -> Tensor:
    """Rotate the pairs of channels `(i, i + hd / 2)` of each position: `[B, T, heads, hd]`."""
    half = x.shape[-1] // 2
    rates = BASE ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None, None] * rates  # [T, 1, half]
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
