"""Sliding-window attention on CUDA by torch's flex_attention, where flash-attn is not installed.

The scores are those of `stu.attention`. Blocks of keys outside the window are never read, and in
those that a window covers as a whole nothing is masked.

Source: Dong et al. 2024, "Flex Attention", arXiv:2412.05496.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from stu.sequences.documents import Documents

if TYPE_CHECKING:
    from stu.attention import Scores

BLOCK = 128
"""Queries, and keys, of a block of the mask. Sequences are padded to a multiple."""


def flex_window_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: "Scores",
    documents: Documents | None = None,
) -> Tensor:
    """Attend as `stu.attention.sliding_window_attention` does; all are `[B, T, heads, head_dim]`.

    The kernel is compiled for the first length, and once more for any other.
    """
    length = keys.shape[1]
    earlier, after = length - queries.shape[1], -length % BLOCK
    # Queries of earlier tokens are padding too, so that positions need no offset.
    q = pad(queries, (0, 0, 0, 0, earlier, after)).transpose(1, 2)  # [B, heads, T, head_dim]
    k, v = (pad(x, (0, 0, 0, 0, 0, after)).transpose(1, 2) for x in (keys, values))
    if documents is None:
        mask = window_mask(length + after, earlier, scores.window_tokens, queries.device)
    else:
        mask = document_mask(documents, scores.window_tokens)
    attend: Any = compiled_attention() if queries.is_cuda else flex_attention
    attended: Tensor = attend(q, k, v, score_mod=score_mod(scores), block_mask=mask)
    return attended[:, :, earlier:length].transpose(1, 2)


@functools.cache
def compiled_attention() -> Callable[..., Any]:
    """Return flex_attention, compiled; otherwise it would hold the scores of all pairs."""
    return torch.compile(flex_attention)


def score_mod(scores: "Scores") -> Callable[..., Tensor]:
    """Return the function that bends scores and adds ALiBi."""
    slopes, _, softcap = scores

    def score(product: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(product / softcap) - slopes[head] * (query - key)

    return score


def in_window(window_tokens: int) -> Callable[..., Tensor]:
    """Return the function that tells whether a query sees a key."""

    def is_seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key <= window_tokens)

    return is_seen


def in_document(window_tokens: int, numbers: Tensor) -> Callable[..., Tensor]:
    """Return the function that tells whether a query sees a key of the same document.

    numbers: number of the document of each token, `[B, T]`.
    """

    def is_seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_near = (key <= query) & (query - key <= window_tokens)
        return is_near & (numbers[batch, query] == numbers[batch, key])

    return is_seen


@torch.compiler.disable  # type: ignore[untyped-decorator]  # else part of every compiled step
@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # training cannot use a mask that inference has made
def window_mask(
    length: int, first_query: int, window_tokens: int, device: torch.device
) -> BlockMask:
    """Return the mask of a window over `length` positions, a multiple of `BLOCK`.

    Blocks of queries before `first_query` see nothing.
    """
    seen, whole = _window_blocks(length, window_tokens, device)
    last = BLOCK * torch.arange(1, length // BLOCK + 1, device=device) - 1  # query of a block
    seen &= (last >= first_query)[:, None]
    return _block_mask(seen[None], whole[None], in_window(window_tokens))


@torch.compiler.disable  # type: ignore[untyped-decorator]
@functools.lru_cache(maxsize=2)  # the layers of a model share it
@torch.inference_mode(False)
def document_mask(documents: Documents, window_tokens: int) -> BlockMask:
    """Return the mask of a window that ends where a document begins, for rows padded to a multiple
    of `BLOCK`."""
    after = -documents.shape[1] % BLOCK
    numbers = pad(documents.numbers, (0, after), value=documents.shape[0] * documents.shape[1])
    seen, whole = _window_blocks(numbers.shape[1], window_tokens, numbers.device)
    # Documents of a row have rising numbers: [B, blocks]
    first, last = numbers[:, ::BLOCK], numbers[:, BLOCK - 1 :: BLOCK]
    seen = seen & (last[:, None] >= first[:, :, None])  # last key's, first query's
    whole = whole & (first[:, None] == last[:, :, None])
    return _block_mask(seen, whole, in_document(window_tokens, numbers))


def _window_blocks(length: int, window_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return whether blocks of queries see anything of blocks of keys, and whether all of their
    pairs are seen: `[blocks, blocks]` both.

    Bounds of blocks are enough here: torch would write out all pairs of positions.
    """
    first = BLOCK * torch.arange(length // BLOCK, device=device)[:, None]  # query or key of a block
    last = first + BLOCK - 1
    key_first, key_last = first.T, last.T  # [1, blocks]
    seen = (key_first <= last) & (first - key_last <= window_tokens)
    return seen, (key_last <= first) & (last - key_first <= window_tokens)


def _block_mask(seen: Tensor, whole: Tensor, mask: Callable[..., Tensor]) -> BlockMask:
    length = BLOCK * seen.shape[-1]
    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole),
        *_listed(seen & whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask,
        seq_lengths=(length, length),
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen blocks of keys for each block of queries, `[B, 1, blocks]`, and
    their indices, before those of others, `[B, 1, blocks, blocks]`."""
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    counts = chosen.sum(-1, dtype=torch.int32)
    return counts[:, None], order.to(torch.int32)[:, None]
