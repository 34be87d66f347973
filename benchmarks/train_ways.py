"""What `benchmarks train` compares: models of one size, and other ways to mix tokens in them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.convolution import two_branch_convolution
from stu import attention
from stu.attention import sliding_window_attention
from stu.config import ModelConfig
from stu.mixers import Memory
from stu.model import FlashSTU
from stu.stu_mixer import TensordotSTU
from train.flops import token_flops


@dataclass(frozen=True)
class Way:
    """A model, and what is changed in it while it runs."""

    layout: str
    """A layout of `ModelConfig`, or `attention`."""
    change: Callable[[], AbstractContextManager[Any]] = nullcontext


def make_model(layout: str, shape: ModelConfig) -> FlashSTU:
    """A model of about the size that `shape` has in the `stu` layout; hybrids are larger."""
    if layout != "attention":
        return FlashSTU(replace(shape, layout=layout))
    # An attention block's matrices have 3 D^2 weights more than an STU's: one unit of `mlp_ratio`.
    # Of a hybrid twice as deep, every second block has attention.
    twice = {"num_layers": 2 * shape.num_layers, "mlp_ratio": shape.mlp_ratio - 1}
    model = FlashSTU(replace(shape, layout="hybrid", **twice))
    model.blocks = nn.ModuleList(
        block for i, block in enumerate(model.blocks) if model.config.mixers[i] == "attention"
    )
    return model


def flops_per_token(name: str, model: FlashSTU, context: int) -> dict[str, float | None]:
    """Of one sequence, as `train.flops` counts them; it knows no two-branch convolution."""
    config = model.config  # of an attention model the hybrid's, with as many attention blocks
    if name in ("attention", "attention_sdpa"):
        config = replace(config, window_tokens=context)
    counted = token_flops(config, context, 1, recomputes=False)
    flops: dict[str, float | None] = {
        "dense": 6.0 * model.num_parameters(),
        "convolution": counted.convolution,
        "attention": counted.attention,
    }
    if WAYS[name].layout == "attention":
        flops["convolution"] = 0.0
    elif WAYS[name].change is two_branches:
        flops["convolution"] = None
    return flops


def two_branches() -> AbstractContextManager[Any]:
    """STU layers with both branches convolved, as they are published."""

    def forward(self: TensordotSTU, x: Tensor, filters: Tensor, memory: Memory | None) -> Tensor:
        return two_branch_convolution(
            self.streams(x), filters[: x.shape[1]] @ self.filter_matrix
        )  # [L, K] @ [K, D]

    return patch.object(TensordotSTU, "forward", forward)


def whole_context() -> AbstractContextManager[Any]:
    """Attention of each token to all before it."""

    def attend(
        queries: Tensor, keys: Tensor, values: Tensor, slopes: Tensor, _: int, softcap: float
    ) -> Tensor:
        length = queries.shape[1]
        return sliding_window_attention(queries, keys, values, slopes, length, softcap)

    return patch.object(attention, "sliding_window_attention", attend)


def torch_attention() -> AbstractContextManager[Any]:
    """The same by torch, without softcap and ALiBi."""

    def attend(queries: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))  # [B, heads, T, hd]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return patch.object(attention, "sliding_window_attention", attend)


WAYS = {
    "stu": Way("stu"),
    "stu_two_branch": Way("stu", two_branches),
    "hybrid": Way("hybrid"),
    "hybrid_two_branch": Way("hybrid", two_branches),
    "attention": Way("attention", whole_context),
    "attention_sdpa": Way("attention", torch_attention),
    "attention_windowed": Way("attention"),
}
