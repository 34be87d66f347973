"""Mixers of Stu models: the parts of a block in which tokens see one another.

`present [B, T, 1]` is true at tokens and false at padding, which must be on the left; None: there
is none. `memory` is what the layer remembers (`memory_stu.LayerMemory`); None: the tokens are whole
sequences.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_stu import StuConfig
from .layers_stu import Float32Module
from .memory_stu import LayerMemory, Past, Realisation

QUERY_BLOCK = 256
SHORT_TAPS, LOWEST_BAND, FILTER_WIDTH, SINE_LAYERS = 3, 1e-4, 64, 3
DECAYED_TO, FASTEST, SLOWEST = 0.01, 0.3, 1.5


def masked(x: Tensor, present: Tensor | None) -> Tensor:
    """Return `x [B, T, ..]` with zeros at padding, which no convolution then sees."""
    return x if present is None else x.masked_fill(~present, 0)


def convolve(inputs: Tensor, taps: Tensor, num_outputs: int | None = None) -> Tensor:
    """Return the last `num_outputs` of `y[t] = sum_j taps[j] inputs[t - j]`, for each channel.

    inputs: `[B, T, C]`; taps: `[N, C]`. Sums are in float32 or wider.
    """
    length = inputs.shape[1]
    num_outputs = length if num_outputs is None else num_outputs
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    wide, taps = inputs.to(dtype), taps[:length].to(dtype)
    if num_outputs == 1:
        outputs = (wide[:, -len(taps) :] * taps.flip(0)).sum(1, keepdim=True)
    else:
        n = 1 << (length + len(taps) - 2).bit_length()
        spectrum = torch.fft.rfft(wide, n=n, dim=1) * torch.fft.rfft(taps, n=n, dim=0)
        outputs = torch.fft.irfft(spectrum, n=n, dim=1)[:, length - num_outputs : length]
    return outputs.to(inputs.dtype)


class StuMixer(nn.Module):
    """A spectral transform unit: convolutions with fixed filters, in one of two forms.

    tensordot: `y = psi * (x W)`, `psi = Phi M`, with the minus branch of the same weights, so that
    the taps are `2 psi[i]` at even lags and 0 at odd ones. full: `y = sum_k M+_k U+_k + M-_k U-_k`,
    where `U±` is x convolved with `phi_k[i]` and `(-1)^i phi_k[i]`.
    """

    def __init__(self, config: StuConfig) -> None:
        super().__init__()
        self.is_full, width, count = config.stu_form == "full", config.width, config.num_filters
        if self.is_full:
            self.plus_matrices = nn.Parameter(torch.empty(count, width, width))
            self.minus_matrices = nn.Parameter(torch.empty(count, width, width))
        else:
            self.input_matrix = nn.Parameter(torch.empty(width, width))
            self.filter_matrix = nn.Parameter(torch.empty(count, width))

    def forward(
        self,
        x: Tensor,
        filters: Tensor | None,
        present: Tensor | None,
        memory: LayerMemory | None,
        realisation: Realisation | None,
    ) -> Tensor:
        assert filters is not None
        inputs = masked(x if self.is_full else x @ self.input_matrix, present)
        length, past = inputs.shape[1], None
        if memory is not None and realisation is not None:
            past = realisation.step(memory, inputs)
        elif memory is not None:
            inputs = memory.append("inputs", inputs)
        filters = filters[: inputs.shape[1]]
        signs = (1 - 2 * (torch.arange(len(filters), device=x.device) % 2))[:, None]
        if self.is_full:
            plus = self._branch(inputs, filters, length, past, 0)
            return plus + self._branch(inputs, signs * filters, length, past, 1)
        taps = (1 + signs) * filters @ self.filter_matrix.to(filters.dtype)  # [N, D]
        mixed = convolve(inputs, taps, length)
        if past is not None:
            outputs = past.outputs.T @ self.filter_matrix.to(past.outputs.dtype)  # [r, D]
            added = torch.einsum("str,bsdr->btd", past.decays, past.state * outputs.T)
            mixed = mixed + added.to(x.dtype)
        return mixed

    def _branch(
        self, inputs: Tensor, taps: Tensor, length: int, past: Past | None, branch: int
    ) -> Tensor:
        """Return a branch of the full form, `[B, T, D]`: plus is 0, minus 1."""
        streams = inputs.transpose(1, 2).reshape(-1, inputs.shape[1], 1)  # [B, T, D] -> [B D, T, 1]
        streams = convolve(streams.expand(-1, -1, taps.shape[1]), taps, length)
        streams = streams.view(len(inputs), -1, length, taps.shape[1])  # -> [B, D, T, K]
        if past is not None:
            states = past.state[:, branch, :, None] * past.outputs  # [B, D, K, r]
            added = torch.einsum("tr,bdkr->bdtk", past.decays[branch], states)
            streams = streams + added.to(streams.dtype)
        matrices = self.minus_matrices if branch else self.plus_matrices
        return torch.einsum("bdtk,kde->bte", streams, matrices)


class StuAttention(nn.Module):
    """Causal attention to the last `window_tokens` tokens, with softcap and ALiBi."""

    def __init__(self, config: StuConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.width // config.num_heads
        self.window_tokens, self.softcap = config.window_tokens, config.softcap
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self,
        x: Tensor,
        filters: Tensor | None,
        present: Tensor | None,
        memory: LayerMemory | None,
        realisation: Realisation | None,
    ) -> Tensor:
        batch, length, _ = x.shape
        split = self.qkv(x).view(batch, length, 3, self.num_heads, self.head_dim)
        queries, keys, values = split.unbind(2)  # [B, T, heads, head_dim]
        if present is None:
            present = torch.ones(batch, length, 1, dtype=torch.bool, device=x.device)
        if memory is not None:
            keys = memory.append("keys", keys, self.window_tokens)
            values = memory.append("values", values, self.window_tokens)
            present = memory.append("present", present, self.window_tokens)
        dtype = torch.promote_types(x.dtype, torch.float32)
        queries, keys, values = (part.to(dtype).transpose(1, 2) for part in (queries, keys, values))
        earlier = keys.shape[2] - length
        blocks = []
        for start in range(earlier, earlier + length, QUERY_BLOCK):
            stop, first = (
                min(start + QUERY_BLOCK, earlier + length),
                max(0, start - self.window_tokens),
            )
            positions = torch.arange(first, stop, device=x.device)
            blocks.append(
                self._attend(
                    queries[:, :, start - earlier : stop - earlier],
                    keys[:, :, first:stop],
                    values[:, :, first:stop],
                    positions[start - first :, None] - positions,
                    present[:, None, None, first:stop, 0],
                )
            )
        attended = torch.cat(blocks, dim=2).transpose(1, 2).flatten(2)
        projected: Tensor = self.output(attended.to(x.dtype))
        return projected

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, distances: Tensor, present: Tensor
    ) -> Tensor:
        products = queries @ keys.transpose(-1, -2) * (self.head_dim**-0.5 / self.softcap)
        slopes = alibi_slopes(self.num_heads).to(queries)
        scores = self.softcap * products.tanh() - slopes[:, None, None] * distances
        # Padding sees itself, as its scores would all be infinite otherwise.
        unseen = (distances < 0) | (distances > self.window_tokens) | (~present & (distances != 0))
        attended: Tensor = scores.masked_fill(unseen, -math.inf).softmax(-1) @ values
        return attended


def alibi_slopes(num_heads: int) -> Tensor:
    """Return one slope per head, times 0.25."""
    below = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / below) for head in range(below)]
    slopes += [2.0 ** (-4.0 * (2 * head + 1) / below) for head in range(num_heads - below)]
    return 0.25 * torch.tensor(slopes, dtype=torch.float32)


class StuHyena(nn.Module):
    """Hyena of order 2: `output(x1 * (psi conv (x2 * v)))`, psi from a `StuImplicitFilter`."""

    short_bias: nn.Parameter | None

    def __init__(self, config: StuConfig) -> None:
        super().__init__()
        has_biases, width = config.blocks == "plain", config.width
        self.input = nn.Linear(width, 3 * width, bias=has_biases)
        self.short_taps = nn.Parameter(torch.empty(SHORT_TAPS, 3 * width))
        bias = nn.Parameter(torch.empty(3 * width)) if has_biases else None
        self.register_parameter("short_bias", bias)
        self.implicit_filter = StuImplicitFilter(config)
        self.output = nn.Linear(width, width, bias=has_biases)

    def forward(
        self,
        x: Tensor,
        filters: Tensor | None,
        present: Tensor | None,
        memory: LayerMemory | None,
        realisation: Realisation | None,
    ) -> Tensor:
        projected = masked(self.input(x), present)  # [B, T, 3 D]
        length, last = x.shape[1], SHORT_TAPS - 1
        inputs = projected
        if memory is not None:
            inputs = memory.append("projected", projected, last)
        inputs = F.pad(inputs, (0, 0, max(0, length + last - inputs.shape[1]), 0))
        taps = self.short_taps.to(x.dtype)
        convolved = taps[0] * inputs[:, last:]
        for lag in range(1, SHORT_TAPS):
            convolved = convolved + taps[lag] * inputs[:, last - lag : last - lag + length]
        if self.short_bias is not None:
            convolved = convolved + self.short_bias
        outer_gate, inner_gate, values = convolved.chunk(3, dim=-1)
        gated = masked(inner_gate * values, present)
        known = None if memory is None else memory.taps
        if memory is not None:
            gated = memory.append("gated", gated)
        if known is None or len(known) < gated.shape[1]:
            known = self.implicit_filter(gated.shape[1] if memory is None else 2 * gated.shape[1])
        if memory is not None:
            memory.taps = known
        mixed: Tensor = self.output(outer_gate * convolve(gated, known, length))
        return mixed


class StuImplicitFilter(Float32Module):
    """Filters as functions of the lag: `window(t) * network(features(t))`, and a term at lag 0."""

    def __init__(self, config: StuConfig) -> None:
        super().__init__()
        self.length, self.width = config.max_seq_len, config.width
        self.num_bands, self.floor = config.filter_bands, config.filter_floor

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=torch.float32))

        self.input_matrix = parameter(1 + 2 * self.num_bands, FILTER_WIDTH)
        self.hidden_matrices = parameter(SINE_LAYERS - 1, FILTER_WIDTH, FILTER_WIDTH)
        self.biases = parameter(SINE_LAYERS, FILTER_WIDTH)
        self.frequencies = parameter(FILTER_WIDTH)
        self.output_matrix = parameter(FILTER_WIDTH, config.width)
        self.skip = parameter(config.width)

    def forward(self, num_taps: int) -> Tensor:
        """Return the taps `[num_taps, D]` from lag 0, at most to the end of the context."""
        # In float64, which some devices lack: float32 has too few digits for the angles.
        lags = torch.arange(min(num_taps, self.length), dtype=torch.float64, device="cpu")[:, None]
        ends = LOWEST_BAND, self.num_bands - 1
        bands = torch.linspace(*ends, self.num_bands, dtype=torch.float64, device="cpu")
        angles = 2 * math.pi * lags / self.length * bands
        times = lags / max(1, self.length - 1)
        hidden = torch.cat([times, angles.cos(), -angles.sin()], dim=1).to(self.skip)
        matrices = self.input_matrix, *self.hidden_matrices
        for matrix, bias in zip(matrices, self.biases, strict=True):
            hidden = torch.sin(self.frequencies * (hidden @ matrix + bias))
        slow, fast = (-math.log(DECAYED_TO) / share for share in (SLOWEST, FASTEST))
        decays = torch.linspace(slow, fast, self.width).to(self.skip)
        window = torch.exp(-times.to(self.skip) * decays) + self.floor
        taps = window * (hidden @ self.output_matrix)
        return torch.cat([taps[:1] + self.skip, taps[1:]])


MIXERS = {"stu": StuMixer, "attention": StuAttention, "hyena": StuHyena}
