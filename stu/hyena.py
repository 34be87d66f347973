"""Hyena of order 2: a long convolution between two gates, its filters made by a small network.

Poli et al. 2023, "Hyena Hierarchy: Towards Larger Convolutional Language Models", arXiv:2302.10866.
The filters depend on the lag alone and never on the data, so that FutureFill decodes with them as
with those of an STU. The constants are those of the published language models, by the names in
brackets (HazyResearch/safari on GitHub: `src/models/sequence/hyena.py` and its defaults, and
`configs/experiment/pile/hyena.yaml`). Other than there, features of lags are not trained, and the
linear layers and the short convolutions have no biases.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.config import ModelConfig
from stu.layers import LongConvolution, Memory

SHORT_TAPS = 3
"""Of the convolution of each projected channel (`short_filter_order`)."""
NUM_BANDS = 16
"""Frequencies in the features of a lag; with sines, cosines and the lag itself 33 (`emb_dim`)."""
LOWEST_BAND = 1e-4
"""Turns over the whole context, of the lowest one; the others are near 1, 2, .. `NUM_BANDS` - 1."""
FILTER_WIDTH = 64
"""Of the network's hidden layers (`filter_order`)."""
SINE_LAYERS = 3
"""One from the features and two from hidden to hidden (`num_inner_mlps`)."""
SINE_FREQUENCY = 14.0
"""Before training, inside the sines (`w`): the larger, the faster filters vary."""
WEIGHT_STD = 0.02
"""Before training, of the network's matrices (`initializer_range` in `long_conv_lm.py`)."""
DECAYED_TO = 0.01
"""What the window has fallen to (`target`)"""
FASTEST, SLOWEST = 0.3, 1.5
"""at this share of the context, in the last channel and in the first (`fast_decay_pct`, `slow_..`).
"""


class Hyena(LongConvolution):
    """`output(x1 * (psi conv (x2 * v)))`, where x1, x2 and v are projections, each convolved with a
    few taps of its own channel, and psi is an `ImplicitFilter`."""

    lag_step = 1

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(layer)
        self.input = nn.Linear(config.width, 3 * config.width, bias=False)
        self.short_taps = nn.Parameter(torch.empty(SHORT_TAPS, 3 * config.width))
        self.filter = ImplicitFilter(config)
        self.output = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, filters: Tensor, memory: Memory | None) -> Tensor:
        projected = self.input(x)  # [B, T, D] -> [B, T, 3 D]
        if memory is None:
            shortly = short_convolution(after_zeros(projected, SHORT_TAPS), self.short_taps)
        else:
            shortly = memory.convolve_short(self.layer, projected, self.short_taps)
        outer_gate, inner_gate, values = shortly.chunk(3, dim=-1)
        mixed = self.convolved(inner_gate * values, filters, memory)
        gated: Tensor = self.output(outer_gate * mixed)
        return gated

    def taps(self, filters: Tensor) -> Tensor:
        lags = torch.arange(len(filters), dtype=filters.dtype, device=filters.device)
        with torch.autocast(filters.device.type, enabled=False):
            taps: Tensor = self.filter(lags)
        return taps

    def initialize_filters(self) -> None:
        """Draw both convolutions' weights from torch's global generator."""
        bound = SHORT_TAPS**-0.5  # torch's own of a convolution, as published
        nn.init.uniform_(self.short_taps, -bound, bound)
        self.filter.initialize()


class ImplicitFilter(nn.Module):
    """Filters of all channels as functions of the lag: `window(t) * network(features(t))`, and at
    lag 0 a trained term besides, which lets a token's own input through.

    The features of lag m are `t = m / (L - 1)` and, at each of the bands f, the real and imaginary
    parts of `exp(-2 pi i f m / L)`; the window is `exp(-decay t)`, with fixed decays from slow in
    the first channel to fast in the last.

    Weights stay at least float32 when a model is cast: rounding to bfloat16 changes the taps of an
    STU by 0.4% at most, and these by up to 2% before training and 5% after 200 steps of it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.length, self.width = config.max_seq_len, config.width
        # Not `nn.Linear`s, which would compute in the dtype of their weights.
        self.input_matrix = nn.Parameter(torch.empty(1 + 2 * NUM_BANDS, FILTER_WIDTH))
        self.hidden_matrices = nn.Parameter(
            torch.empty(SINE_LAYERS - 1, FILTER_WIDTH, FILTER_WIDTH)
        )
        self.biases = nn.Parameter(torch.empty(SINE_LAYERS, FILTER_WIDTH))
        self.frequencies = nn.Parameter(torch.empty(FILTER_WIDTH))
        self.output_matrix = nn.Parameter(torch.empty(FILTER_WIDTH, config.width))
        self.skip = nn.Parameter(torch.empty(config.width))

    def forward(self, lags: Tensor) -> Tensor:
        """Taps `[N, D]` of all channels at the lags 0 to N - 1, `lags [N]`, in their dtype."""
        dtype = lags.dtype
        hidden = self._features(lags)  # [N, 33]
        matrices = self.input_matrix, *self.hidden_matrices
        for matrix, bias in zip(matrices, self.biases, strict=True):
            hidden = hidden @ matrix.to(dtype) + bias.to(dtype)
            hidden = torch.sin(self.frequencies.to(dtype) * hidden)  # [N, FILTER_WIDTH]
        taps = self._window(lags) * (hidden @ self.output_matrix.to(dtype))  # [N, D]
        taps[0] += self.skip.to(dtype)
        return taps

    def initialize(self) -> None:
        """Draw the weights from torch's global generator, as published."""
        for matrix in (self.input_matrix, self.hidden_matrices, self.output_matrix):
            nn.init.normal_(matrix, std=WEIGHT_STD)
        nn.init.zeros_(self.biases)
        nn.init.constant_(self.frequencies, SINE_FREQUENCY)
        nn.init.normal_(self.skip)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ImplicitFilter":
        def kept_wide(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype.itemsize >= 4 else tensor.to(result.device)

        super()._apply(kept_wide, recurse)  # type: ignore[no-untyped-call]
        return self

    def _features(self, lags: Tensor) -> Tensor:
        # In float64: the angle grows to some hundred, of which float32 leaves too few digits.
        turns = lags.double()[:, None] / self.length
        bands = torch.linspace(
            LOWEST_BAND, NUM_BANDS - 1, NUM_BANDS, dtype=turns.dtype, device=turns.device
        )
        angles = 2 * math.pi * turns * bands  # [N, NUM_BANDS]
        features = torch.cat([self._times(lags.double()), angles.cos(), -angles.sin()], dim=1)
        return features.to(lags.dtype)

    def _window(self, lags: Tensor) -> Tensor:
        decays = torch.linspace(
            -math.log(DECAYED_TO) / SLOWEST,
            -math.log(DECAYED_TO) / FASTEST,
            self.width,
            dtype=lags.dtype,
            device=lags.device,
        )
        return torch.exp(-self._times(lags) * decays)  # [N, 1] * [D] -> [N, D]

    def _times(self, lags: Tensor) -> Tensor:
        return lags[:, None] / max(1, self.length - 1)


def short_convolution(inputs: Tensor, taps: Tensor) -> Tensor:
    """`y[t] = sum_j taps[j] * inputs[t - j]`, with few taps `[J, C]` for each channel.

    inputs: `[B, J - 1 + T, C]`, those before the first output with them. Returns `[B, T, C]` in
    their dtype.
    """
    taps = taps.to(inputs.dtype)  # autocast projects to 16 bits and leaves taps in 32
    length, last = inputs.shape[1] - len(taps) + 1, len(taps) - 1
    outputs = taps[0] * inputs[:, last:]
    for lag in range(1, len(taps)):
        outputs = outputs + taps[lag] * inputs[:, last - lag : last - lag + length]
    return outputs


def after_zeros(inputs: Tensor, num_taps: int) -> Tensor:
    """What a short convolution takes of whole sequences: `[B, T, C] -> [B, J - 1 + T, C]`."""
    return F.pad(inputs, (0, 0, num_taps - 1, 0))
