"""Mixers: the parts of a block in which tokens see one another.

A mixer is a class in a file of its own, registered in `stu.layouts`. Besides its forward pass, the
class states everything that other code must know about it: its initial weights, what training it
costs, what it remembers while decoding, and which of its weights are treated apart. The model, the
optimizer, the planner, the engine's caches and the benchmarks ask the mixer and never name one.
"""

import functools
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import log2
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from stu.config import ModelConfig
from stu.convolution import causal_convolution, fast_fft_length
from stu.layers import Costs
from stu.layouts import MIXERS
from stu.sequences.base import Sequences
from stu.sequences.documents import Documents
from stu.slices.channels import ChannelRanks, Divided

FLOAT_BYTES = 4


@dataclass(frozen=True)
class PastInputs:
    """All inputs of a long convolution with fixed filters."""

    channels: int
    """Filters of a layer, C."""
    lag_step: int = 1
    """Distance between the taps of a filter, in positions."""
    streams: int = 1
    """Streams of C channels into which a layer divides a sequence; they share the filters."""
    basis: Literal["mixed", "alternating"] | None = None
    """How the filters come from the few that `LongConvolution.basis` returns. mixed: as weighted
    sums. alternating: the first half of the channels has them, and the second half has them with
    the sign (-1)^i at lag i, and all channels of a stream have the same input. None: otherwise."""

    @property
    def may_have_states(self) -> bool:
        """Whether an engine can keep states in place of inputs, if the filters have any. Those of
        mixed filters are of one stream."""
        return self.basis == "alternating" or (self.basis == "mixed" and self.streams == 1)


@dataclass(frozen=True)
class LastInputs:
    """The last `num_taps - 1` inputs of a short convolution."""

    channels: int
    num_taps: int


@dataclass(frozen=True)
class KeyWindow:
    """Keys and values of the token itself and of `window_tokens` before it."""

    window_tokens: int
    num_heads: int
    head_dim: int
    softcap: float
    first_head: int = 0
    all_heads: int | None = None
    """Heads of the layer, of which these are some, from `first_head` on; None: these are all."""


Remembered = PastInputs | LastInputs | KeyWindow
Kind = TypeVar("Kind", PastInputs, LastInputs, KeyWindow)


class Memory(Sequences):
    """Sequences that a decoder remembers, and whose next tokens the batch has.

    `number` counts the layers that remember the same kind, from 0.
    """

    def length(self, num_tokens: int) -> int:
        return 0  # the decoder knows how much it can remember

    def convolve(self, layer: "LongConvolution", inputs: Tensor, filters: Tensor) -> Tensor:
        streams = layer.streams(inputs)
        return layer.joined(self.continue_convolution(layer.numbers[PastInputs], streams))

    def convolve_short(self, layer: "Mixer", inputs: Tensor, taps: Tensor) -> Tensor:
        return self.continue_short_convolution(layer.numbers[LastInputs], inputs, taps)

    def attend(
        self, layer: "WindowAttention", queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        return self.continue_attention(layer.numbers[KeyWindow], queries, keys, values)

    @abstractmethod
    def continue_convolution(self, number: int, streams: Tensor) -> Tensor:
        """Take a long convolution's inputs `[S, T, C]` at the next T positions; return its
        outputs, of the same shape."""

    @abstractmethod
    def continue_short_convolution(self, number: int, inputs: Tensor, taps: Tensor) -> Tensor:
        """Take a short convolution's inputs `[B, T, C]` and its taps `[J, C]`; return its
        outputs `[B, T, C]`."""

    @abstractmethod
    def continue_attention(
        self, number: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Take queries, keys and values of the next T positions, all `[B, T, heads, head_dim]`;
        return the attended values, of the same shape."""


class Mixer(nn.Module, ABC):
    """A causal layer `[B, T, D] -> [B, T, D]` in which tokens see one another.

    Args:
        remembers: What the layer must remember of a sequence while decoding, at most one of each
            kind. `Memory` has a method for each.
    """

    needs_filters: ClassVar[bool] = False
    """Whether `forward` reads the model's spectral filters."""
    stacked_matrices: tuple[tuple[str, int], ...] = ()
    """Names of weights that are several matrices, one below the other, and how many."""
    summed: ClassVar[tuple[str, ...]] = ()
    """Names of the projections whose inputs are `divided`: their outputs are summed over ranks."""
    ranks: ChannelRanks | None = None
    """Ranks that each compute some of the channels; None if this one computes them all."""

    def __init__(self, *remembers: Remembered) -> None:
        super().__init__()
        self.remembers = remembers
        self.numbers: dict[type[Remembered], int] = {}
        """Number of this layer among those that remember the same kind, set by the model."""

    @abstractmethod
    def forward(self, x: Tensor, filters: Tensor, sequences: Sequences) -> Tensor:
        """Mix `x`. Tokens see one another by what `sequences` compute, and by nothing else.

        filters: the spectral filters `[L, K]`, or `[L, 0]` if no mixer of the model needs them.
        """

    @abstractmethod
    def initialize(self, depth_scale: float) -> None:
        """Draw initial weights from torch's global generator.

        depth_scale: factor for a projection that ends the residual branch.
        """

    @property
    def filter_modules(self) -> tuple[nn.Module, ...]:
        """Submodules that compute filters from lags alone, once for a batch. Their weights stay
        float32 or wider when a model is cast."""
        return ()

    @property
    def undecayed_names(self) -> set[str]:
        """Names of weights that are not decayed, besides vectors: those of `filter_modules`."""
        apart = {id(p) for module in self.filter_modules for p in module.parameters()}
        return {name for name, p in self.named_parameters() if id(p) in apart}

    def training_costs(self, seq_len: int, micro_batch_size: int) -> tuple[Costs, Costs]:
        """Return the costs of the forward and of the backward pass: here, those of products with
        every weight. Mixers that do more add it."""
        shared = sum(p.numel() for module in self.filter_modules for p in module.parameters())
        weights = sum(p.numel() for p in self.parameters()) - shared + shared / micro_batch_size
        return Costs(dense=2.0 * weights), Costs(dense=4.0 * weights)

    @property
    def matrices(self) -> dict[str, int]:
        """Names of the matrices that activations are multiplied with, and their dim of outputs."""
        modules = self.named_modules()
        return {f"{name}.weight": 0 for name, own in modules if isinstance(own, nn.Linear)}

    @property
    def divided(self) -> dict[str, Divided]:
        """Names of the weights of which ranks have parts, and how; none: of each they have all."""
        return {}

    def take_part(self, ranks: ChannelRanks) -> None:
        """Compute and remember this rank's channels alone from now on, by its part of `divided`."""
        self.ranks = ranks

    @property
    def decoding_weights(self) -> int:
        """Number of weights that each decoded token is multiplied with."""
        return sum(self.get_parameter(name).numel() for name in self.matrices)

    def imitate_gpu(self, is_half: bool) -> None:
        """Keep for the backward pass what is kept on a GPU, for the planner, which counts it."""

    def pack(self, packed: Callable[[Tensor], nn.Module] | None) -> None:
        """Arrange weights for decoding; if `packed` is given, replace products with those outside
        of `nn.Linear` by modules `packed(weight)`, which compute `x @ weight.T`. The engine calls
        this on a copy of the model, which shares its weights: they may move."""


class LongConvolution(Mixer):
    """A mixer with one causal convolution, whose filters span the context and do not depend on the
    data."""

    def __init__(self, past: PastInputs, *others: Remembered) -> None:
        super().__init__(past, *others)
        self.past = past

    @abstractmethod
    def taps(self, filters: Tensor) -> Tensor:
        """Compute the taps `[N, C]` at the lags below `len(filters)`, in the dtype of `filters`,
        which is float32 or wider."""

    def basis(self, filters: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the filters `[N, K]` that `PastInputs.basis` speaks of, tap j at lag `lag_step j`,
        and their weights `[K, C]` in each channel if they are mixed."""
        raise NotImplementedError(f"the filters of {type(self).__name__} have no basis")

    def weights_of_all(self, filters: Tensor) -> Tensor | None:
        """Return the weights of `basis` in the channels of all ranks."""
        return self.basis(filters)[1]

    def streams(self, inputs: Tensor) -> Tensor:
        """Divide inputs into the streams that share the filters, `[B, T, ..] -> [S, T, C]`; here
        each row is one."""
        return inputs

    def joined(self, streams: Tensor) -> Tensor:
        """Return the convolved streams of each row together, `[S, T, C] -> [B, T, ..]`."""
        return streams

    def convolved(self, inputs: Tensor, taps: Tensor) -> Tensor:
        """Return the convolution of whole sequences: `[B, T, ..]` with `[N, C]`."""
        return self.joined(causal_convolution(self.streams(inputs), taps, self.past.lag_step))

    def channel_taps(self, filters: Tensor, channels: slice) -> Tensor:
        """Compute the taps of some channels."""
        return self.taps(filters)[:, channels]

    def training_costs(self, seq_len: int, micro_batch_size: int) -> tuple[Costs, Costs]:
        past, (forward, backward) = self.past, super().training_costs(seq_len, micro_batch_size)
        length = fast_fft_length(2 * -(-seq_len // past.lag_step) - 1)
        sequences = past.lag_step * past.streams * micro_batch_size
        # Transforms of inputs, taps and outputs; backward, of both gradients too.
        counts = past.channels * (2 * sequences + 1), past.channels * (3 * sequences + 2)
        first, second = (
            Costs(
                convolution=count * 2.5 * length * log2(length) / (seq_len * micro_batch_size),
                fft_bytes=count * length * 4.0 * FLOAT_BYTES / (seq_len * micro_batch_size),
            )
            for count in counts
        )
        return forward + first, backward + second


class WindowAttention(Mixer):
    """A mixer in which each token attends to a window of tokens before it."""

    def __init__(self, window: KeyWindow) -> None:
        super().__init__(window)
        self.window = window

    @abstractmethod
    def attended(
        self, queries: Tensor, keys: Tensor, values: Tensor, documents: Documents | None = None
    ) -> Tensor:
        """Return the attention to a window of whole sequences, or of documents that share rows.

        All are `[B, T, heads, head_dim]`; keys and values may begin with those of earlier tokens.
        """


def make_mixer(name: str, config: ModelConfig) -> Mixer:
    """Make the mixer that is registered under `name`."""
    entry = MIXERS[name]
    make = pkgutil.resolve_name(entry) if isinstance(entry, str) else entry
    mixer: Mixer = make(config)
    return mixer


@functools.cache
def planned_mixers(config: ModelConfig) -> tuple[Mixer, ...]:
    """Return the mixer of each block, without contents: it answers questions and takes no memory.
    Blocks of one kind share theirs."""
    with torch.device("meta"):
        made = {name: make_mixer(name, config) for name in dict.fromkeys(config.mixers)}
    return tuple(made[name] for name in config.mixers)


def remembered(mixers: Iterable[Mixer], kind: type[Kind]) -> list[Kind]:
    """Return what is remembered of one kind by every layer that remembers it."""
    return [memory for mixer in mixers for memory in mixer.remembers if isinstance(memory, kind)]
