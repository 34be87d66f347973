"""Mixers: the parts of a block in which tokens see one another.

A mixer is a class in a file of its own, registered in `stu.layouts`. Besides its forward pass, the
class states everything that other code must know about it: how its weights are initialised, what
training it costs, what it remembers while decoding, and which of its weights are treated apart. The
model, the optimizer, the planner, the engine's caches and the benchmarks ask the mixer and never
name one.
"""

import functools
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import log2
from typing import ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.convolution import after_zeros, causal_convolution, fast_fft_length, short_convolution
from stu.documents import Documents
from stu.layers import Costs
from stu.layouts import MIXERS
from stu.slices.channels import ChannelRanks, Divided
from stu.slices.convolution import convolve_by_channels, convolve_short_slices
from stu.slices.ranks import SliceRanks

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


class Memory(Protocol):
    """A decoder's record of earlier tokens, which layers ask instead of mixing a whole sequence.

    `layer` numbers the layers that remember the same kind, from 0.
    """

    def convolve(self, layer: int, streams: Tensor) -> Tensor:
        """Take a long convolution's inputs `[S, T, C]` at the next T positions; return its
        outputs, of the same shape."""

    def convolve_short(self, layer: int, inputs: Tensor, taps: Tensor) -> Tensor:
        """Take a short convolution's inputs `[B, T, C]` and its taps `[J, C]`; return its
        outputs `[B, T, C]`."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
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
    keeps_documents_apart: ClassVar[bool] = False
    """Whether `forward` takes `documents`, and no token sees another document then."""
    divides_sequences: ClassVar[bool] = False
    """Whether `forward` computes slices of sequences, where `slices` is set."""
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
        self.slices: SliceRanks | None = None
        """Ranks that each have a slice of every sequence; None if it is whole. Set by the model."""

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        filters: Tensor,
        memory: Memory | None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Mix `x`: whole sequences, the next tokens of those in `memory`, or rows of `documents`
        that are kept apart.

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

    def pack(self, packed: Callable[[Tensor], nn.Module]) -> None:
        """Replace products with weights outside of `nn.Linear` by modules `packed(weight)`, which
        compute `x @ weight.T`. The engine calls this on a copy of the model."""

    def convolve_short(
        self,
        inputs: Tensor,
        taps: Tensor,
        memory: Memory | None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Convolve each channel with a few taps of its own: `[B, T, C]` with `[J, C]`."""
        if memory is not None:
            return memory.convolve_short(self.numbers[LastInputs], inputs, taps)
        if self.slices is not None:
            return convolve_short_slices(self.slices, inputs, taps)
        positions = None if documents is None else documents.positions
        return short_convolution(after_zeros(inputs, len(taps)), taps, positions)


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

    def convolve(
        self,
        streams: Tensor,
        filters: Tensor,
        memory: Memory | None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Convolve each stream with its own filter: `[S, T, C]` both ways. A layer that divides
        sequences into several streams does not pass `documents` here."""
        if memory is not None:
            return memory.convolve(self.numbers[PastInputs], streams)
        if self.slices is not None:
            return self.convolve_slices(streams, filters, self.slices)
        taps, step = self.taps(filters[: streams.shape[1]]), self.past.lag_step
        if documents is not None:
            mixed: Tensor = documents.apply(causal_convolution, (streams,), taps, step)
            return mixed
        return causal_convolution(streams, taps, step)

    def convolve_slices(self, streams: Tensor, filters: Tensor, slices: SliceRanks) -> Tensor:
        """Convolve this rank's slice of each stream; here, in exchange for channels."""
        taps = functools.partial(self.channel_taps, filters[: slices.size * streams.shape[1]])
        return convolve_by_channels(slices, streams, taps, self.past.lag_step)

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


def check_documents_apart(config: ModelConfig) -> None:
    """Raise UserError, naming it, if a mixer of the model cannot keep documents apart."""
    for name, mixer in zip(config.mixers, planned_mixers(config), strict=True):
        if not mixer.keeps_documents_apart:
            layout = f"layout={config.layout} cannot keep documents apart"
            fix = "take data.documents=together or another layout"
            raise UserError(message=f"{layout}, as its mixer {name} does not: {fix}")


def remembered(mixers: Iterable[Mixer], kind: type[Kind]) -> list[Kind]:
    """Return what is remembered of one kind by every layer that remembers it."""
    return [memory for mixer in mixers for memory in mixer.remembers if isinstance(memory, kind)]
