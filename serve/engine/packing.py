"""Weights in the layout that oneDNN multiplies fastest, for the CPU.

`torch.nn.functional.linear` reorders the weights in every call, which takes a third to a half of a
step of few rows. Here they are reordered once. Products are the same: of float32 or bfloat16,
summed in float32, and rounded to bfloat16 at the end. `serve.engine.int8` has those of weights of 8
bits.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from stu.layers import GatedMLP, gelu

USUAL_ROWS = 32
"""Number of rows that the layout is usually optimised for; others are multiplied in it too. A
layout for one row is faster for that in float32, and slower for a few."""
MANY_ROWS = 256
"""Rows of a full piece. Smaller pieces take longer a row."""
ROWS_AT_ONCE = 64
"""Most rows of a piece of those that fill no full one."""
ROWS_MULTIPLE = 8
"""oneDNN keeps half a megabyte of code for each number of rows, so there are few: these smaller
pieces are padded to a multiple of this, but for a single row."""


class RowsTogether(nn.Module, ABC):
    """A product `[.., in] -> [.., out]` of numbers of rows that oneDNN keeps code for."""

    @abstractmethod
    def product(self, rows: Tensor) -> Tensor:
        """Multiply at most `ROWS_AT_ONCE` rows, or `MANY_ROWS`."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        num_many = len(rows) - len(rows) % MANY_ROWS
        many, rest = rows[:num_many], rows[num_many:]
        pieces = [*torch.split(many, MANY_ROWS), *torch.split(rest, ROWS_AT_ONCE)]
        pieces = [piece for piece in pieces if len(piece)] or [rows]
        parts = [self._padded_product(piece) for piece in pieces]
        products = parts[0] if len(parts) == 1 else torch.cat(parts)
        return products.view(*x.shape[:-1], -1)

    def _padded_product(self, rows: Tensor) -> Tensor:
        missing = -len(rows) % ROWS_MULTIPLE if len(rows) > 1 else 0
        padded = pad(rows, (0, 0, 0, missing)) if missing else rows
        return self.product(padded)[: len(rows)]


class PackedLinear(RowsTogether):
    """`x @ weight.T`, `[.., in] -> [.., out]`, for inference; with `gelu`, its tanh-GELU.

    usual_rows: Number of rows that the layout is optimised for.
    """

    def __init__(self, weight: Tensor, gelu: bool = False, usual_rows: int = USUAL_ROWS) -> None:
        super().__init__()
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self._weight: Tensor = reorder(weight.detach().contiguous(), usual_rows)
        self._activation: tuple[str, list[float], str] = ("none", [], "")
        if gelu:
            self._activation = ("gelu", [], "tanh")

    def product(self, rows: Tensor) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise
        products: Tensor = product(rows, self._weight, None, *self._activation)
        return products


class PackedGatedMLP(nn.Module):
    """`stu.layers.GatedMLP`, packed."""

    def __init__(self, mlp: GatedMLP, usual_rows: int = USUAL_ROWS) -> None:
        super().__init__()
        pack = partial(PackedLinear, usual_rows=usual_rows)
        self.gate = pack(mlp.gate.weight, gelu=True)
        self.up, self.down = pack(mlp.up.weight), pack(mlp.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        return in_pieces(x, lambda rows: self.down(self.gate(rows).mul_(self.up(rows))))


def in_pieces(x: Tensor, layers: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply layers that treat rows independently, `[.., in] -> [.., out]`, to `MANY_ROWS` rows at a
    time, so that intermediate results stay in the processor's cache."""
    parts = [layers(rows) for rows in torch.split(x.flatten(0, -2), MANY_ROWS)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], -1)


def gelu_of_rows(x: Tensor) -> Tensor:
    """Return the tanh-GELU of `x [.., H]`, row by row: torch rounds the last numbers of what each
    thread computes differently, so rows together would depend on their places in the batch."""
    rows = torch.split(x.flatten(0, -2), 1)
    return torch.cat([gelu(row) for row in rows]).view(x.shape)


def packs(weight: Tensor) -> bool:
    """Return whether this weight can be packed."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    is_packed = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and has_bfloat16())
    return weight.device.type == "cpu" and has_onednn and is_packed


def has_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 itself."""
    cpu = torch.cpu
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
