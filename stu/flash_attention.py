"""Sliding-window attention by flash-attn, and a function that keeps what it keeps."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stu.sequences.documents import Documents

if TYPE_CHECKING:
    from stu.attention import Scores


def flash_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: "Scores",
    documents: Documents | None,
) -> Tensor:
    """Attend as `stu.attention.sliding_window_attention` does, by flash-attn."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    score: dict[str, Any] = {"causal": True, "window_size": (scores.window_tokens, 0)}
    score |= {"softcap": scores.softcap, "alibi_slopes": scores.slopes.float()}
    attended: Tensor
    if documents is None:
        attended = flash_attn_func(queries, keys, values, **score)
        return attended
    attended = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (queries, keys, values)),  # [B T, heads, head_dim]
        cu_seqlens_q=documents.bounds,
        cu_seqlens_k=documents.bounds,
        max_seqlen_q=documents.longest,
        max_seqlen_k=documents.longest,
        **score,
    )
    return attended.view_as(queries)


def flash_stand_in(queries: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    """Return nothing of use, and keep for the backward pass what flash-attn keeps."""
    attended: Tensor = _FlashStandIn.apply(queries, keys, values)  # type: ignore[no-untyped-call]
    return attended


class _FlashStandIn(torch.autograd.Function):
    """A function that keeps what flash-attn keeps: its inputs, its output, and a float32 for each
    query and head."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attended = torch.empty_like(queries)
        sums = torch.empty(queries.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(queries, keys, values, attended, sums)
        return attended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values, _, _ = ctx.saved_tensors
        return torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
