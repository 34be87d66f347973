"""Linear layers with adapters, of which each row of a batch has its own, or none.

The narrow matrices of all adapters are joined: A to `[R, in]`, B to `[out, R]`, where R is the sum
of their ranks. A layer computes `x W^T + ((x A^T) * f) B^T`, and the factors f, `[R]` for each row,
are 0 but for the row's own adapter, where they are its scale. So a step computes the same products
whichever adapters its rows have: nothing is gathered, a CUDA graph can replay it, and a row's sums
do not depend on the other rows. Each adapter costs every row `rank * (in + out)` multiplications in
a layer, beside `in * out`: the rows of 8 adapters of rank 16 take 9% more at in = 1,024, out =
12,288.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from serve.adapters.folder import Adapter
from serve.cache.window_blocks import on_device
from stu.common.errors import UserError
from stu.model import FlashSTU

Product = Callable[[Tensor], Tensor]


class Adapters:
    """The adapters of a model, and which of them each row has.

    Args:
        adapters: All of them.
        num_rows: Rows of the batch.
        weight: A weight of the model, whose device and dtype adapters get.
    """

    def __init__(self, adapters: Sequence[Adapter], num_rows: int, weight: Tensor) -> None:
        self._adapters, self._weight = adapters, weight
        ranks = [max(len(own.a) for own in adapter.layers.values()) for adapter in adapters]
        self.rank = sum(ranks)
        """Sum of all ranks, R."""
        self._spans: dict[str, slice] = {}
        self._factors_of = {"": weight.new_zeros(self.rank)}
        for adapter, end, rank in zip(adapters, torch.tensor(ranks).cumsum(0), ranks, strict=True):
            span = self._spans[adapter.name] = slice(int(end) - rank, int(end))
            factors = weight.new_zeros(self.rank)
            factors[span] = adapter.scale
            self._factors_of[adapter.name] = factors
        self._by_row = weight.new_zeros(num_rows + 1, self.rank)
        """Factors of each row; the last one is for padding."""
        self.factors = self._by_row[:1, None]
        """Factors of the rows or tokens that go through the model, `[B, 1, R]` or `[1, T, R]`."""

    @property
    def layers(self) -> set[str]:
        """Names of the layers that any adapter is beside."""
        return {name for adapter in self._adapters for name in adapter.layers}

    def require(self, name: str) -> None:
        """Raise UserError if there is no adapter of this name."""
        if name not in self._factors_of:
            known = ", ".join(filter(None, self._factors_of)) or "none, as there are no adapters"
            raise UserError("adapter", name, f"one of {known}")

    def admit(self, row: int, name: str) -> None:
        """Give a row the adapter of this name; an empty name means none."""
        if self.rank:
            self._by_row[row] = self._factors_of[name]

    def begin_rows(self, rows: Tensor) -> None:
        """Let the next tokens of rows `[B]` go through the model. A function of tensors alone."""
        self.factors = self._by_row.index_select(0, rows)[:, None]  # [B, 1, R]

    def of_prompts(self, rows: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Return the factors `[1, T, R]` of chunks of prompts, one after the other."""
        if not self.rank:
            return self._weight.new_zeros(1, sum(lengths), 0)
        index, counts = (on_device(np.array(own), self._weight.device) for own in (rows, lengths))
        factors = self._by_row.index_select(0, index)
        return factors.repeat_interleave(counts, 0, output_size=sum(lengths))[None]

    def joined(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return the joined matrices `[R, in]` and `[out, R]` beside a layer."""
        (a, b), *_ = (own.layers[layer] for own in self._adapters if layer in own.layers)
        all_a = self._weight.new_zeros(self.rank, a.shape[1])
        all_b = self._weight.new_zeros(len(b), self.rank)
        for adapter in self._adapters:
            if layer in adapter.layers:
                a, b = adapter.layers[layer]
                first = self._spans[adapter.name].start
                all_a[first : first + len(a)] = a.to(all_a)
                all_b[:, first : first + len(a)] = b.to(all_b)
        return all_a, all_b


class AdaptedLinear(nn.Module):
    """A linear layer `[.., in] -> [.., out]` with adapters beside it."""

    def __init__(self, linear: nn.Module, a: Product, b: Product, adapters: Adapters) -> None:
        super().__init__()
        self.linear = linear
        self._a, self._b, self._adapters = a, b, adapters

    def forward(self, x: Tensor) -> Tensor:
        narrow = self._a(x) * self._adapters.factors  # [.., R]
        outputs: Tensor = self.linear(x) + self._b(narrow)
        return outputs


def adapt(model: FlashSTU, adapters: Adapters, product: Callable[[Tensor], Product]) -> None:
    """Put adapters beside the linear layers of a model, in place.

    product: Returns the function `x -> x @ weight.T` of a weight.
    """
    for name in adapters.layers:
        parent, _, own = name.rpartition(".")
        a, b = map(product, adapters.joined(name))
        module = model.get_submodule(parent)
        setattr(module, own, AdaptedLinear(getattr(module, own), a, b, adapters))


def is_adapted(module: nn.Module) -> bool:
    """Return whether a module has layers with adapters beside them."""
    return any(isinstance(child, AdaptedLinear) for child in module.children())
