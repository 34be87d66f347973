"""Variants of the model that `python -m benchmarks train` compares, in models of about one size.

`stu`, `hybrid`: the model as it is. `.._two_branch`: the same weights, with the convolution as
published (`benchmarks.training.convolution`) and torch's gradients. `attention_windowed`: attention
in every block over the hybrid layout's window, and MLPs smaller by as many weights as attention has
more than an STU. `attention_sdpa`: the same over the whole context by torch's
`scaled_dot_product_attention`, without softcap and ALiBi.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.nn import functional as F

from benchmarks.training.convolution import two_branch_convolution
from stu import attention
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.sequences.base import Sequences
from stu.stu_mixer import TensordotSTU


@dataclass(frozen=True)
class Variant:
    """A layout, and a change to the model while it runs."""

    layout: str
    change: Callable[[], AbstractContextManager[Any]] = nullcontext


def make_model(layout: str, shape: ModelConfig) -> FlashSTU:
    """Make a model of about the size that `shape` has in the `stu` layout; hybrids are larger."""
    # An attention block's matrices have 3 D^2 weights more than an STU's: one unit of `mlp_ratio`.
    mlp_ratio = shape.mlp_ratio - 1 if layout == "attention" else shape.mlp_ratio
    return FlashSTU(replace(shape, layout=layout, mlp_ratio=mlp_ratio))


def two_branches() -> AbstractContextManager[Any]:
    """Convolve both branches of STU layers, as they are published."""

    def forward(layer: TensordotSTU, x: Tensor, filters: Tensor, sequences: Sequences) -> Tensor:
        return two_branch_convolution(
            x @ layer.input_matrix, filters[: x.shape[1]] @ layer.filter_matrix
        )  # [L, K] @ [K, D]

    return patch.object(TensordotSTU, "forward", forward)


def torch_attention() -> AbstractContextManager[Any]:
    """Attend over the whole context by torch."""

    def attend(queries: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))  # [B, heads, T, hd]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return patch.object(attention, "sliding_window_attention", attend)


VARIANTS = {
    "stu": Variant("stu"),
    "stu_two_branch": Variant("stu", two_branches),
    "hybrid": Variant("hybrid"),
    "hybrid_two_branch": Variant("hybrid", two_branches),
    "attention_sdpa": Variant("attention", torch_attention),
    "attention_windowed": Variant("attention"),
}
