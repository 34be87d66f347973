"""Modules of a model whose decoding steps run kernels, for CUDA."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from serve.kernels.gated import gated_product
from serve.kernels.norm import add_norm
from stu.layers import GatedMLP, RMSNorm


class KernelRMSNorm(nn.Module):
    """`stu.layers.RMSNorm` as one kernel."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return add_norm(rows, None, self.weight, self.eps)[1].view(x.shape)


class KernelGatedMLP(nn.Module):
    """`stu.layers.GatedMLP` with gate and up as one matrix.

    The weights of `mlp`, and of every module that shares them, become parts of that matrix, so they
    are in memory once. They can be read, saved and changed in place as before.
    """

    def __init__(self, mlp: GatedMLP) -> None:
        super().__init__()
        self.gate_up = torch.cat([mlp.gate.weight.detach(), mlp.up.weight.detach()])
        mlp.gate.weight.data, mlp.up.weight.data = self.gate_up.chunk(2)
        self.down = mlp.down

    def forward(self, x: Tensor) -> Tensor:
        products = gated_product(linear(x.reshape(-1, x.shape[-1]), self.gate_up))
        gated: Tensor = self.down(products)
        return gated.view(x.shape)
