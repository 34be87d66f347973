"""A Llama-like model with static key and value caches: the peer on a GPU.

Rotary positions, SwiGLU and RMSNorm as in Touvron et al. 2023, arXiv:2302.13971, with torch's
scaled_dot_product_attention and a tied embedding. Nothing in a step depends on Python numbers, so
that it can be compiled and captured.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.config import ModelConfig

MULTIPLE = 64
"""Hidden widths are multiples of this."""
ROPE_BASE = 10_000.0
Cache = tuple[Tensor, Tensor]
"""Keys and values of a layer. They are two tensors, as Inductor writes to a part of one only by
copying all of it."""


class LlamaLayer(nn.Module):
    """Attention and a gated MLP."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        cache: Cache,
        position: Tensor,
        seen: Tensor | None,
        only_last: bool = False,
    ) -> Tensor:
        """Return the stream `[B, T, D]` after the layer, for tokens from `position [T]` on.

        Args:
            x: Stream `[B, T, D]`.
            rotation: Cosines and sines of the positions, `[2, T, head_dim / 2]`.
            cache: Keys and values, each `[B, heads, S, head_dim]`, to which the new ones are
                written.
            position: Positions of the tokens, `[T]`.
            seen: Positions that tokens see, `[T, S]`; None: a whole prompt from position 0 on.
            only_last: Return the stream of the last token alone, `[B, 1, D]`.
        """
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T, head_dim]
        queries, keys = rotated(queries, rotation), rotated(keys, rotation)
        all_keys, all_values = cache
        all_keys.index_copy_(2, position, keys)
        all_values.index_copy_(2, position, values)
        if only_last:
            x, queries = x[:, -1:], queries[:, :, -1:]
        if seen is None:
            is_causal = not only_last  # the last token sees all
            mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=is_causal)
        else:
            mixed = F.scaled_dot_product_attention(queries, all_keys, all_values, attn_mask=seen)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        down: Tensor = x + self.down(F.silu(gate) * up)
        return down


class LlamaLike(nn.Module):
    """A model of about `num_parameters`, with the width, depth and heads of `shape`."""

    def __init__(self, shape: ModelConfig, num_parameters: int) -> None:
        super().__init__()
        width, layers = shape.width, shape.num_layers
        others = shape.vocab_size * width + layers * 4 * width**2
        hidden = MULTIPLE * max(
            1, round((num_parameters - others) / (3 * layers * width) / MULTIPLE)
        )
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.layers = nn.ModuleList(
            LlamaLayer(width, shape.num_heads, hidden) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width)
        half = torch.arange(shape.head_dim // 2)
        angles = torch.outer(
            torch.arange(shape.max_seq_len), ROPE_BASE ** (-2 * half / shape.head_dim)
        )
        self.register_buffer("rotations", torch.stack([angles.cos(), angles.sin()]))

    rotations: Tensor
    """Cosines and sines, `[2, max_seq_len, head_dim / 2]`."""

    def make_cache(self, batch: int, positions: int) -> list[Cache]:
        """Return the cache of each layer, twice `[B, heads, positions, head_dim]`."""
        size = batch, self.shape.num_heads, positions, self.shape.head_dim
        weight = self.embedding.weight
        return [(weight.new_zeros(size), weight.new_zeros(size)) for _ in self.layers]

    def prefill(self, tokens: Tensor, caches: list[Cache]) -> Tensor:
        """Read prompts `[B, T]`; return the logits `[B, vocab_size]` of the next tokens."""
        position = torch.arange(tokens.shape[1], device=tokens.device)
        return self._forward(tokens, caches, position, None)

    def step(self, tokens: Tensor, caches: list[Cache], position: Tensor) -> Tensor:
        """Read a token of each sequence, `[B]`, at `position [1]`; return the logits
        `[B, vocab_size]` of the next."""
        places = torch.arange(caches[0][0].shape[2], device=tokens.device)
        return self._forward(tokens[:, None], caches, position, places[None] <= position[:, None])

    def _forward(
        self, tokens: Tensor, caches: list[Cache], position: Tensor, seen: Tensor | None
    ) -> Tensor:
        x, rotation = self.embedding(tokens), self.rotations[:, position]
        for number, (layer, cache) in enumerate(zip(self.layers, caches, strict=True), 1):
            only_last = seen is None and number == len(self.layers)
            x = layer(x, rotation, cache, position, seen, only_last)
        return F.linear(self.norm(x[:, 0]), self.embedding.weight)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs of channels of `[B, heads, T, head_dim]` by the angles of their positions."""
    cosines, sines = rotation.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
