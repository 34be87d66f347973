"""Weights in the layout that oneDNN multiplies fastest, for float32 on the CPU.

`torch.nn.functional.linear` reorders the weights in every call, which takes a third to a half of a
step of few rows. Here they are reordered once; the products are the same, summed in float32.
"""

import copy
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from stu.layers import GatedMLP
from stu.mixers import Mixer
from stu.model import FlashSTU

USUAL_ROWS = 32
"""Number of rows that the layout is optimised for; others are multiplied in it too."""
ROWS_AT_ONCE = 64
ROWS_MULTIPLE = 8
"""oneDNN keeps half a megabyte of code for each number of rows, so rows are padded to multiples of
this, up to `ROWS_AT_ONCE`; a single row is not padded."""


class PackedLinear(nn.Module):
    """`x @ weight.T`, `[.., in] -> [.., out]`, for inference; with `gelu`, its tanh-GELU."""

    def __init__(self, weight: Tensor, gelu: bool = False) -> None:
        super().__init__()
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self._weight: Tensor = reorder(weight.detach().contiguous(), USUAL_ROWS)
        self._activation: tuple[str, list[float], str] = ("none", [], "")
        if gelu:
            self._activation = ("gelu", [], "tanh")

    def forward(self, x: Tensor) -> Tensor:
        parts = [self._product(rows) for rows in torch.split(x.flatten(0, -2), ROWS_AT_ONCE)]
        products = parts[0] if len(parts) == 1 else torch.cat(parts)
        return products.view(*x.shape[:-1], -1)

    def _product(self, rows: Tensor) -> Tensor:
        missing = -len(rows) % ROWS_MULTIPLE if len(rows) > 1 else 0
        padded = pad(rows, (0, 0, 0, missing)) if missing else rows
        product = torch.ops.mkldnn._linear_pointwise
        products: Tensor = product(padded, self._weight, None, *self._activation)
        return products[: len(rows)]


class PackedGatedMLP(nn.Module):
    """`stu.layers.GatedMLP`, packed."""

    def __init__(self, mlp: GatedMLP) -> None:
        super().__init__()
        self.gate = PackedLinear(mlp.gate.weight, gelu=True)
        self.up, self.down = PackedLinear(mlp.up.weight), PackedLinear(mlp.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.down(self.gate(x) * self.up(x))
        return gated


def packs(weight: Tensor) -> bool:
    """Return whether this weight can be packed."""
    is_float32_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return is_float32_on_cpu and has_onednn


def packed_copy(model: FlashSTU) -> FlashSTU:
    """Return a copy of `model` whose linear layers are packed, if possible, and which shares all
    other tensors.

    Packed weights are in memory twice while `model` is referenced.
    """
    tensors = chain(model.parameters(), model.buffers())
    shared: dict[int, object] = {id(tensor): tensor for tensor in tensors}
    copied = copy.deepcopy(model, shared)
    if packs(model.embedding.weight):
        for module in list(copied.modules()):
            for name, child in module.named_children():
                setattr(module, name, _packed(child))
    return copied


def packed_product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function `x -> x @ weight.T`, packed if possible."""
    if packs(weight):
        return PackedLinear(weight)
    return lambda x: nn.functional.linear(x, weight)


def _packed(module: nn.Module) -> nn.Module:
    """Return `module`, or the packed module to use instead."""
    if isinstance(module, GatedMLP):
        return PackedGatedMLP(module)
    if isinstance(module, Mixer):
        module.pack(PackedLinear)
    if isinstance(module, nn.Linear):
        return PackedLinear(module.weight)
    return module
