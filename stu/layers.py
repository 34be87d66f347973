"""The layers of a Flash-STU block: RMSNorm, gated MLP, the two STU forms, windowed attention.

What an STU has in common with any other long convolution, `stu.hyena` for one, is here as well.
"""

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.attention import alibi_slopes, sliding_window_attention
from stu.config import ModelConfig
from stu.convolution import causal_convolution


class Memory(Protocol):
    """What a decoder knows of earlier tokens. Layers ask it in place of mixing a whole sequence.

    `layer` counts the layers of one kind, long convolution or attention, from 0.
    """

    def convolve(self, layer: int, streams: Tensor) -> Tensor:
        """Take the convolution's inputs `[S, T, C]` at the next T positions; return its outputs."""

    def convolve_short(self, layer: int, inputs: Tensor, taps: Tensor) -> Tensor:
        """The same of `stu.hyena.short_convolution`: `[B, T, C]` both ways, taps `[J, C]`."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Take `[B, T, heads, head_dim]` at the next T positions; return what attention yields."""


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`; the mean is taken in float32 (Zhang, Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight


class GatedMLP(nn.Module):
    """`down(gelu_tanh(gate(x)) * up(x))` with a hidden width of `mlp_ratio * width`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.mlp_ratio * config.width
        self.gate = nn.Linear(config.width, hidden, bias=False)
        self.up = nn.Linear(config.width, hidden, bias=False)
        self.down = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))
        return gated


class LongConvolution(nn.Module, ABC):
    """A mixer, `[B, T, D] -> [B, T, D]`, in which tokens of any distance see one another by way of
    one causal convolution, whose filters are the same whatever the data."""

    lag_step: int
    """The filters' taps lie this many positions apart."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    @abstractmethod
    def forward(self, x: Tensor, filters: Tensor, memory: Memory | None) -> Tensor:
        """filters: spectral ones, `[L, K]`, or `[L, 0]` in a model that has none."""

    @abstractmethod
    def taps(self, filters: Tensor) -> Tensor:
        """The convolution's taps `[N, C]` at the lags below `len(filters)`, in the dtype of the
        spectral `filters`, which is float32 or wider."""

    def convolved(self, streams: Tensor, filters: Tensor, memory: Memory | None) -> Tensor:
        """Each stream with its own filter, `[S, T, C]` both ways."""
        if memory is not None:
            return memory.convolve(self.layer, streams)
        return causal_convolution(streams, self.taps(filters[: streams.shape[1]]), self.lag_step)


class STU(LongConvolution):
    """A spectral transform unit, which is linear.

    Either form (Liu et al. 2024, "Flash STU") turns its input into streams,
    convolves each with its own filter, and combines the results.
    """

    def forward(self, x: Tensor, filters: Tensor, memory: Memory | None) -> Tensor:
        return self.combine(self.convolved(self.streams(x), filters, memory), x)

    @abstractmethod
    def streams(self, x: Tensor) -> Tensor:
        """What is convolved: `[B, T, D] -> [S, T, C]`."""

    @abstractmethod
    def combine(self, mixed: Tensor, x: Tensor) -> Tensor:
        """The layer's output from the convolved streams: `[S, T, C] -> [B, T, D]`."""


class TensordotSTU(STU):
    """`y = psi * (x W)` with one filter `psi = Phi M` per channel, plus its minus branch.

    The branches share M, so their sum has the filter `2 psi[i]` at even lags and 0 at odd ones.
    """

    lag_step = 2

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(layer)
        self.input_matrix = nn.Parameter(torch.empty(config.width, config.width))
        self.filter_matrix = nn.Parameter(torch.empty(config.num_filters, config.width))

    def taps(self, filters: Tensor) -> Tensor:
        with torch.autocast(filters.device.type, enabled=False):
            taps = 2 * filters[::2] @ self.filter_matrix.to(filters.dtype)  # [L/2, K] @ [K, D]
        return taps

    def streams(self, x: Tensor) -> Tensor:
        return x @ self.input_matrix

    def combine(self, mixed: Tensor, x: Tensor) -> Tensor:
        return mixed


class FullSTU(STU):
    """`y[t] = sum_k M+_k U+_k[t] + M-_k U-_k[t]`, `U±` = x convolved with `phi_k[i]` and
    `(-1)^i phi_k[i]`."""

    lag_step = 1

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(layer)
        shape = config.num_filters, config.width, config.width
        self.plus_matrices = nn.Parameter(torch.empty(shape))
        self.minus_matrices = nn.Parameter(torch.empty(shape))

    def taps(self, filters: Tensor) -> Tensor:
        minus = filters.clone()
        minus[1::2] *= -1
        return torch.cat([filters, minus], dim=1)  # [L, 2 K]

    def streams(self, x: Tensor) -> Tensor:
        channels = x.transpose(1, 2).flatten(0, 1)  # [B, T, D] -> [B D, T]
        return channels[..., None].expand(-1, -1, 2 * len(self.plus_matrices))  # -> [B D, T, 2 K]

    def combine(self, mixed: Tensor, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        mixed = mixed.view(batch, width, length, -1)  # [B D, T, 2 K] -> [B, D, T, 2 K]
        matrices = torch.cat([self.plus_matrices, self.minus_matrices])
        return torch.einsum("bdtk,kde->bte", mixed, matrices)


class SlidingWindowAttention(nn.Module):
    """Causal attention to the last `window_tokens` tokens: ALiBi, softcap, fused qkv, no bias."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, memory: Memory | None) -> Tensor:
        heads = self.config.num_heads, self.config.head_dim
        queries, keys, values = self.qkv(x).unflatten(-1, (3, *heads)).unbind(2)
        # each [B, T, heads, head_dim]
        if memory is None:
            slopes = alibi_slopes(self.config.num_heads).to(x.device)
            window, softcap = self.config.window_tokens, self.config.softcap
            attended = sliding_window_attention(queries, keys, values, slopes, window, softcap)
        else:
            attended = memory.attend(self.layer, queries, keys, values)
        projected: Tensor = self.output(attended.flatten(2))
        return projected
