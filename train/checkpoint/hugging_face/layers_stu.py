"""Layers of Stu models other than their mixers, and the spectral filters."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_stu import StuConfig

NODES_PER_PANEL, LARGEST_X = 14, 40.0


class Float32Module(nn.Module):
    """A module whose own tensors stay float32 or wider when a model is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Module":
        def kept_wide(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype.itemsize >= 4 else tensor.to(result.device)

        super()._apply(kept_wide, recurse)  # type: ignore[no-untyped-call]
        return self


class StuRMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, with the mean in float32 or wider."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight


class StuLayerNorm(nn.Module):
    """`(x - mean) / sqrt(variance + eps) * weight + bias`, computed in float32 or wider."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide, weight, bias = x.to(dtype), self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(wide, (x.shape[-1],), weight, bias, self.eps).to(x.dtype)


class StuPlainMLP(nn.Module):
    """`down(gelu_tanh(up(x)))`, with biases."""

    def __init__(self, config: StuConfig) -> None:
        super().__init__()
        hidden = config.mlp_ratio * config.width
        self.up, self.down = nn.Linear(config.width, hidden), nn.Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return outputs


def make_norm(config: StuConfig) -> StuRMSNorm | StuLayerNorm:
    """Make a norm of the kind that `config.blocks` has."""
    kind = StuLayerNorm if config.blocks == "plain" else StuRMSNorm
    return kind(config.width, config.norm_eps)


class StuMLP(nn.Module):
    """`down(gelu_tanh(gate(x)) * up(x))`."""

    def __init__(self, config: StuConfig) -> None:
        super().__init__()
        hidden = config.mlp_ratio * config.width
        self.gate = nn.Linear(config.width, hidden, bias=False)
        self.up = nn.Linear(config.width, hidden, bias=False)
        self.down = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))
        return gated


class StuFilters(Float32Module):
    """The spectral filters `sigma_k^(1/4) phi_k`, `[L, K]`: a part of the checkpoint."""

    def __init__(self, config: StuConfig) -> None:
        super().__init__()
        shape = config.max_seq_len, config.num_filters
        # Not a buffer, which some versions of transformers cast.
        self.taps = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)

    def forward(self) -> Tensor:
        """Return the filters. A model over several devices moves them as it calls this."""
        return self.taps

    def initialize(self) -> None:
        """Compute the filters of a new model.

        With a Gauss-Legendre rule in x, the Hankel matrix `Z[i, j] = 2 / ((i + j)^3 - (i + j))` is
        `G G^T` with few columns, whose left singular vectors are its eigenvectors.
        """
        length, count = self.taps.shape
        num_doublings = int(np.ceil(np.log2(LARGEST_X * 2 * length)))
        edges = np.concatenate([[0.0], 2.0 ** np.arange(num_doublings + 1) / (2 * length)])
        half = np.diff(edges)[:, None] / 2
        nodes, weights = np.polynomial.legendre.leggauss(NODES_PER_PANEL)
        x, weights = ((edges[:-1, None] + half) + half * nodes).ravel(), (half * weights).ravel()
        scale = np.sqrt(weights * np.exp(-x)) * -np.expm1(-x)
        factor = scale * np.exp(np.multiply.outer(np.arange(length), -x))
        vectors, singular, _ = np.linalg.svd(factor, full_matrices=False)
        filters = singular[:count] ** 0.5 * vectors[:, :count]
        self.taps.copy_(torch.from_numpy(filters * np.where(filters[0] < 0, -1.0, 1.0)))
