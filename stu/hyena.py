"""Hyena of order 2: a long convolution between two gates, whose filters a small network computes.

Poli et al. 2023, "Hyena Hierarchy: Towards Larger Convolutional Language Models", arXiv:2302.10866.
The filters depend on the lag alone, not on the data, so FutureFill decodes with them. The constants
are those of the published language models; their names there are in brackets (HazyResearch/safari
on GitHub: `src/models/sequence/hyena.py` and `configs/experiment/pile/hyena.yaml`). Unlike there,
the features of lags are not trained, and linear layers and short convolutions have biases only in
`plain` blocks, which HyenaDNA has (Nguyen et al. 2023, arXiv:2306.15794).
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from stu.config import ModelConfig
from stu.mixers import LastInputs, LongConvolution, PastInputs
from stu.sequences.base import Sequences
from stu.slices.channels import ChannelRanks, Divided

SHORT_TAPS = 3
"""Taps of the convolution of each projected channel (`short_filter_order`)."""
LOWEST_BAND = 1e-4
"""Turns of the lowest frequency over the whole context; the others are near 1, 2, 3 and so on."""
FILTER_WIDTH = 64
"""Width of the network's hidden layers (`filter_order`)."""
SINE_LAYERS = 3
"""Hidden layers: the first reads the features, two more the layer before (`num_inner_mlps`)."""
SINE_FREQUENCY = 14.0
"""Initial factor inside the sines (`w`); filters vary faster the larger it is."""
WEIGHT_STD = 0.02
"""Initial standard deviation of the network's matrices (`initializer_range`)."""
DECAYED_TO = 0.01
"""Value to which the window falls (`target`)."""
FASTEST, SLOWEST = 0.3, 1.5
"""Share of the context after which the window has fallen to `DECAYED_TO`, in the last channel and
in the first (`fast_decay_pct`, `slow_decay_pct`)."""


class Hyena(LongConvolution):
    """`output(x1 * (psi conv (x2 * v)))`: x1, x2 and v are projections of the input, each convolved
    with a few taps per channel, and psi comes from an `ImplicitFilter`."""

    short_bias: nn.Parameter | None
    stacked_matrices = (("input.weight", 3),)
    summed = ("output",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(PastInputs(config.width), LastInputs(3 * config.width, SHORT_TAPS))
        has_biases = config.blocks == "plain"
        self.input = nn.Linear(config.width, 3 * config.width, bias=has_biases)
        self.short_taps = nn.Parameter(torch.empty(SHORT_TAPS, 3 * config.width))
        short_bias = nn.Parameter(torch.empty(3 * config.width)) if has_biases else None
        self.register_parameter("short_bias", short_bias)
        self.filter = ImplicitFilter(config)
        self.channels = slice(None)
        """Channels that this rank computes. It has the whole filter network, which is small."""
        self.output = nn.Linear(config.width, config.width, bias=has_biases)

    def forward(self, x: Tensor, filters: Tensor, sequences: Sequences) -> Tensor:
        projected = self.input(x)  # [B, T, D] -> [B, T, 3 D]
        convolved = sequences.convolve_short(self, projected, self.short_taps)
        if self.short_bias is not None:
            convolved = convolved + self.short_bias
        outer_gate, inner_gate, values = convolved.chunk(3, dim=-1)
        mixed = sequences.convolve(self, inner_gate * values, filters)
        gated: Tensor = self.output(outer_gate * mixed)
        return gated

    def taps(self, filters: Tensor) -> Tensor:
        return self.channel_taps(filters, self.channels)

    def channel_taps(self, filters: Tensor, channels: slice) -> Tensor:
        lags = torch.arange(len(filters), dtype=filters.dtype, device=filters.device)
        with torch.autocast(filters.device.type, enabled=False):
            taps: Tensor = self.filter(lags, channels)
        return taps

    def initialize(self, depth_scale: float) -> None:
        nn.init.xavier_normal_(self.input.weight)
        nn.init.xavier_normal_(self.output.weight, gain=depth_scale)
        bound = SHORT_TAPS**-0.5  # torch's default for a convolution, as published
        nn.init.uniform_(self.short_taps, -bound, bound)
        self.filter.initialize()
        if self.short_bias is not None:
            for bias in (self.input.bias, self.short_bias, self.output.bias):
                nn.init.zeros_(bias)

    @property
    def divided(self) -> dict[str, Divided]:
        three = {"input.weight": 0, "input.bias": 0, "short_taps": 1, "short_bias": 0}
        if self.short_bias is None:
            three = {"input.weight": 0, "short_taps": 1}
        own = {name: Divided(dim, groups=3) for name, dim in three.items()}
        return own | {"output.weight": Divided(1)}

    def take_part(self, ranks: ChannelRanks) -> None:
        super().take_part(ranks)
        self.channels = ranks.own(self.past.channels)
        count = self.channels.stop - self.channels.start
        self.past = replace(self.past, channels=count)
        self.remembers = (self.past, LastInputs(3 * count, SHORT_TAPS))

    @property
    def filter_modules(self) -> tuple[nn.Module, ...]:
        # Weight decay excludes them too, as published: their size says how fast a filter varies,
        # not how large it is.
        return (self.filter,)


class ImplicitFilter(nn.Module):
    """Filters of all channels as functions of the lag: `window(t) * network(features(t))`, plus a
    trained term at lag 0, which passes a token's own input.

    The features of lag m are `t = m / (L - 1)` and, for each frequency f, the real and imaginary
    parts of `exp(-2 pi i f m / L)`. The window is `exp(-decay t)`, with fixed decays from slow in
    the first channel to fast in the last, plus `filter_floor`.

    The weights stay float32 or wider when a model is cast: rounding them to bfloat16 changes the
    taps by up to 2% before training and 5% after 200 steps of it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.length, self.width = config.max_seq_len, config.width
        self.num_bands, self.floor = config.filter_bands, config.filter_floor
        # Not `nn.Linear`s, which would compute in the dtype of their weights.
        self.input_matrix = nn.Parameter(torch.empty(1 + 2 * self.num_bands, FILTER_WIDTH))
        self.hidden_matrices = nn.Parameter(
            torch.empty(SINE_LAYERS - 1, FILTER_WIDTH, FILTER_WIDTH)
        )
        self.biases = nn.Parameter(torch.empty(SINE_LAYERS, FILTER_WIDTH))
        self.frequencies = nn.Parameter(torch.empty(FILTER_WIDTH))
        self.output_matrix = nn.Parameter(torch.empty(FILTER_WIDTH, config.width))
        self.skip = nn.Parameter(torch.empty(config.width))

    def forward(self, lags: Tensor, channels: slice) -> Tensor:
        """Compute the taps `[N, C]` of some channels at `lags [N]`, which are 0 to N - 1, in their
        dtype."""
        dtype = lags.dtype
        hidden = self._features(lags)  # [N, 1 + 2 bands]
        matrices = self.input_matrix, *self.hidden_matrices
        for matrix, bias in zip(matrices, self.biases, strict=True):
            hidden = hidden @ matrix.to(dtype) + bias.to(dtype)
            hidden = torch.sin(self.frequencies.to(dtype) * hidden)  # [N, FILTER_WIDTH]
        matrix = self.output_matrix[:, channels].to(dtype)
        taps = self._window(lags, channels) * (hidden @ matrix)  # [N, C]
        taps[0] += self.skip[channels].to(dtype)
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
        # In float64: angles reach several hundred, which leaves float32 too few digits.
        turns = lags.double()[:, None] / self.length
        ends = LOWEST_BAND, self.num_bands - 1
        bands = torch.linspace(*ends, self.num_bands, dtype=turns.dtype, device=turns.device)
        angles = 2 * math.pi * turns * bands  # [N, bands]
        features = torch.cat([self._times(lags.double()), angles.cos(), -angles.sin()], dim=1)
        return features.to(lags.dtype)

    def _window(self, lags: Tensor, channels: slice) -> Tensor:
        decays = torch.linspace(
            -math.log(DECAYED_TO) / SLOWEST,
            -math.log(DECAYED_TO) / FASTEST,
            self.width,
            dtype=lags.dtype,
            device=lags.device,
        )
        return torch.exp(-self._times(lags) * decays[channels]) + self.floor  # [N, 1] * [C]

    def _times(self, lags: Tensor) -> Tensor:
        return lags[:, None] / max(1, self.length - 1)
