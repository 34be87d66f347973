"""The sequences whose tokens a batch has. Mixers ask them to let the tokens see one another.

There are three ways: a long convolution, a short one, and attention to a window. Each kind of
sequences says what they are for its tokens, so what a mixer computes by them it computes for every
kind. A batch is of one kind: whole sequences (here), documents that share rows
(`stu.sequences.documents`), slices of sequences that ranks divide (`stu.sequences.slices`), or the
next tokens of those that a decoder remembers (`stu.mixers.Memory`).
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

from stu.convolution import after_zeros, short_convolution

if TYPE_CHECKING:
    from stu.mixers import LongConvolution, Mixer, WindowAttention


class Sequences(ABC):
    """The sequences whose tokens `[B, T]` a model computes."""

    def length(self, num_tokens: int) -> int:
        """Return the length of whole rows of which `num_tokens` are here."""
        return num_tokens

    @abstractmethod
    def convolve(self, layer: "LongConvolution", inputs: Tensor, filters: Tensor) -> Tensor:
        """Convolve each channel with the filter of its own that the layer makes from the spectral
        filters `[L, K]`: `[B, T, C] -> [B, T, ..]`, as `layer.convolved`."""

    @abstractmethod
    def convolve_short(self, layer: "Mixer", inputs: Tensor, taps: Tensor) -> Tensor:
        """Convolve each channel with a few taps of its own: `[B, T, C]` with `[J, C]`."""

    @abstractmethod
    def attend(
        self, layer: "WindowAttention", queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Attend from each token to the window before it, as `layer.attended`; all are
        `[B, T, heads, head_dim]`."""


class WholeSequences(Sequences):
    """Sequences that are a row each."""

    def convolve(self, layer: "LongConvolution", inputs: Tensor, filters: Tensor) -> Tensor:
        return layer.convolved(inputs, layer.taps(filters[: inputs.shape[1]]))

    def convolve_short(self, layer: "Mixer", inputs: Tensor, taps: Tensor) -> Tensor:
        return short_convolution(after_zeros(inputs, len(taps)), taps)

    def attend(
        self, layer: "WindowAttention", queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        return layer.attended(queries, keys, values)


WHOLE = WholeSequences()
