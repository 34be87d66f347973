"""Sliding-window attention on CUDA by torch's flex_attention, where flash-attn is not installed.

The scores are those of `stu.attention`. Blocks of keys outside the window are never read, and in
those that a window covers as a whole nothing is masked.

Source: Dong et al. 2024, "Flex Attention", arXiv:2412.05496.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

BLOCK = 128
"""Queries, and keys, of a block of the mask. Sequences are padded to a multiple."""


def flex_window_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    slopes: Tensor,
    window_tokens: int,
    softcap: float,
) -> Tensor:
    """Attend as `stu.attention.sliding_window_attention` does; all are `[B, T, heads, head_dim]`.

    The kernel is compiled for the first length, and once more for any other.
    """
    length = keys.shape[1]
    earlier, after = length - queries.shape[1], -length % BLOCK
    # Queries of earlier tokens are padding too, so that positions need no offset.
    q = pad(queries, (0, 0, 0, 0, earlier, after)).transpose(1, 2)  # [B, heads, T, head_dim]
    k, v = (pad(x, (0, 0, 0, 0, 0, after)).transpose(1, 2) for x in (keys, values))
    mask = window_mask(length + after, earlier, window_tokens, queries.device)
    attend: Any = compiled_attention() if queries.is_cuda else flex_attention
    attended: Tensor = attend(q, k, v, score_mod=scores(slopes, softcap), block_mask=mask)
    return attended[:, :, earlier:length].transpose(1, 2)


@functools.cache
def compiled_attention() -> Callable[..., Any]:
    """Return flex_attention, compiled; otherwise it would hold the scores of all pairs."""
    return torch.compile(flex_attention)


def scores(slopes: Tensor, softcap: float) -> Callable[..., Tensor]:
    """Return the function that bends scores and adds ALiBi. slopes: `[heads]`."""

    def score(product: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(product / softcap) - slopes[head] * (query - key)

    return score


def in_window(window_tokens: int) -> Callable[..., Tensor]:
    """Return the function that tells whether a query sees a key."""

    def is_seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key <= window_tokens)

    return is_seen


@torch.compiler.disable  # type: ignore[untyped-decorator]  # else part of every compiled step
@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # training cannot use a mask that inference has made
def window_mask(
    length: int, first_query: int, window_tokens: int, device: torch.device
) -> BlockMask:
    """Return the mask of a window over `length` positions, a multiple of `BLOCK`.

    Blocks of queries before `first_query` see nothing. Bounds of blocks are enough here: torch
    would write out all pairs of positions.
    """
    blocks = torch.arange(length // BLOCK, device=device)
    first = BLOCK * blocks[:, None]  # query or key of a block
    last = first + BLOCK - 1
    key_first, key_last = first.T, last.T  # [1, blocks]
    seen = (key_first <= last) & (first - key_last <= window_tokens) & (last >= first_query)
    whole = (key_last <= first) & (last - key_first <= window_tokens)
    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole),
        *_listed(seen & whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=in_window(window_tokens),
        seq_lengths=(length, length),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen blocks of keys for each block of queries, `[1, 1, blocks]`, and
    their indices, before those of others, `[1, 1, blocks, blocks]`."""
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    counts = chosen.sum(-1, dtype=torch.int32)
    return counts[None, None], order.to(torch.int32)[None, None]
