"""Weights in the layout that oneDNN multiplies by fastest: on CPU, in float32.

`torch.nn.functional.linear` arranges the weights anew in every call, which costs a third to a half
of a step of few rows; here they are arranged once. The products are the same, summed in float32.
"""

import copy
from collections.abc import Callable
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

USUAL_ROWS = 32
"""The layout is chosen for so many; others are multiplied in it too."""


class PackedLinear(nn.Module):
    """`x @ weight.T`, `[.., in] -> [.., out]`, for inference."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self._weight: Tensor = reorder(weight.detach(), USUAL_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
        return product


def packs(weight: Tensor) -> bool:
    """Whether there is a layout to pack this weight into."""
    is_float32_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_float32_on_cpu and has_onednn


def packed_copy(model: Model) -> Model:
    """`model` with its linear layers packed, where that can be, and all other tensors shared.

    What is packed lies in memory twice, for as long as somebody holds `model`.
    """
    shared: dict[int, object] = {id(its): its for its in chain(model.parameters(), model.buffers())}
    copied = copy.deepcopy(model, shared)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child.bias is None and packs(child.weight):
                setattr(module, name, PackedLinear(child.weight))
    return copied


def packed_product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """`x -> x @ weight.T`, packed where that can be."""
    if packs(weight):
        return PackedLinear(weight)
    return lambda x: nn.functional.linear(x, weight)
