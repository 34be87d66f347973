"""Modules of a model whose decoding steps run kernels, for CUDA."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from serve.kernels.gated import gated_product
from serve.kernels.narrow_product import narrow_product
from serve.kernels.norm import add_norm
from stu.layers import GatedMLP, RMSNorm, joined
from stu.quantization import ByteWeights, Quantized, quantized


class KernelRMSNorm(nn.Module):
    """`stu.layers.RMSNorm` as one kernel."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return add_norm(rows, None, self.weight, self.eps)[1].view(x.shape)


class NarrowLinear(nn.Module):
    """`x @ weight.T`, `[.., in] -> [.., out]`, with weights of 8 bits, which share the memory of
    `weight`."""

    def __init__(self, weight: Quantized) -> None:
        super().__init__()
        self.values, self.scales = weight.values.contiguous(), weight.scales

    def forward(self, x: Tensor) -> Tensor:
        products = narrow_product(x.reshape(-1, x.shape[-1]), self.values, self.scales)
        return products.view(*x.shape[:-1], -1)


class KernelGatedMLP(nn.Module):
    """`stu.layers.GatedMLP` with gate and up as one matrix.

    Args:
        gate_up: Product with both.
        down: Product with `down`.
    """

    def __init__(self, gate_up: Callable[[Tensor], Tensor], down: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        products = gated_product(self.gate_up(x.reshape(-1, x.shape[-1])))
        gated: Tensor = self.down(products)
        return gated.view(x.shape)


def kernel_mlp(mlp: GatedMLP) -> KernelGatedMLP:
    """Return the MLP that runs kernels.

    The weights of `mlp`, and of every module that shares them, become parts of one matrix, so they
    are in memory once. They can be read, saved and changed in place as before.
    """
    gate_up = joined(mlp.gate.weight, mlp.up.weight)
    return KernelGatedMLP(partial(linear, weight=gate_up), mlp.down)


def narrow_mlp(mlp: GatedMLP, weights: ByteWeights) -> KernelGatedMLP:
    """Return the MLP that runs kernels, with weights of 8 bits. Those that `mlp` has in this format
    already become parts of one matrix, as those of `kernel_mlp`."""
    gate, up, down = (quantized(own, weights) for own in (mlp.gate, mlp.up, mlp.down))
    values, scales = joined(gate.values, up.values), torch.cat([gate.scales, up.scales])
    gate_up = NarrowLinear(Quantized(values, scales))
    return KernelGatedMLP(gate_up, NarrowLinear(down))
