"""Documents that share rows of a batch and are kept apart: no token sees another document.

A document is mixed as it would be in a row of its own, from position 0 on. The tokens of documents
of about one length are gathered into a tensor of their own, padded at its end; a causal function of
whole sequences then needs no mask, does no work for the rest of the row, and reads nothing of
other documents.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stu.convolution import after_zeros, short_convolution
from stu.sequences.base import Sequences

if TYPE_CHECKING:
    from stu.mixers import LongConvolution, Mixer, WindowAttention

LEAST_PADDED = 16
"""Length to which shorter documents are padded."""


class Documents(Sequences):
    """Documents that share rows `[B, T]`: each is computed as if it were alone in a row.

    Args:
        lengths: Tokens of each document of each row, in order. Those of a row sum to T.
        device: Device of the tensors to mix.
    """

    def __init__(
        self, lengths: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> None:
        _leave_uncompiled()
        tokens = np.array([length for row in lengths for length in row], dtype=np.int64)
        (num_tokens,) = {sum(row) for row in lengths}
        assert tokens.min() > 0, "every document has tokens"
        self.shape = len(lengths), num_tokens
        self.longest = int(tokens.max())
        """Tokens of the longest document."""
        padded = np.minimum([padded_length(length) for length in tokens.tolist()], num_tokens)
        sizes, counts = np.unique(padded, return_counts=True)
        self._groups = list(zip(counts.tolist(), sizes.tolist(), strict=True))
        order = padded.argsort(kind="stable")
        first_slots = np.empty_like(padded)
        first_slots[order] = padded[order].cumsum() - padded[order]
        starts = tokens.cumsum() - tokens
        positions = np.arange(len(lengths) * num_tokens) - starts.repeat(tokens)
        numbers = np.arange(len(tokens)).repeat(tokens)
        tensors = np.stack([first_slots.repeat(tokens) + positions, positions, numbers])
        slots, *others = torch.from_numpy(tensors).to(device)
        self._slots = slots  # [B T]
        self.positions, self.numbers = (tensor.view(self.shape) for tensor in others)
        """Position of each token in its document, and the document's number in the batch: `[B, T]`
        both."""
        bounds = np.append(starts, len(numbers)).astype(np.int32)
        self.bounds = torch.from_numpy(bounds).to(device)
        """Place in `B T` at which each document starts, and the end: int32 `[documents + 1]`."""

    def convolve(self, layer: "LongConvolution", inputs: Tensor, filters: Tensor) -> Tensor:
        taps = layer.taps(filters[: inputs.shape[1]])
        mixed: Tensor = self.apply(layer.convolved, (inputs,), taps)
        return mixed

    def convolve_short(self, layer: "Mixer", inputs: Tensor, taps: Tensor) -> Tensor:
        return short_convolution(after_zeros(inputs, len(taps)), taps, self.positions)

    def attend(
        self, layer: "WindowAttention", queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        return layer.attended(queries, keys, values, documents=self)

    def apply(
        self, function: Callable[..., Tensor], sequences: Sequence[Tensor], *others: Any
    ) -> Tensor:
        """Return `function(*sequences, *others)`, as it is for each document alone.

        function: a causal function of tensors `[S, P, ..]`, which returns one: it is called for the
        documents of each padded length P, and so several times.
        sequences: tensors `[B, T, ..]`.
        """
        slots, groups = self._slots, self._groups
        if groups == [self.shape]:  # each row is one document
            return function(*sequences, *others)
        sizes = [count * length for count, length in groups]
        padded = [
            _Scattered.apply(tensor.flatten(0, 1), slots, sum(sizes)).split(sizes)  # type: ignore[no-untyped-call]
            for tensor in sequences
        ]
        mixed = [
            function(*(part.view(*group, *part.shape[1:]) for part in parts), *others).flatten(0, 1)
            for group, *parts in zip(groups, *padded, strict=True)
        ]
        gathered: Tensor = _Gathered.apply(torch.cat(mixed), slots)  # type: ignore[no-untyped-call]
        return gathered.view(*self.shape, *gathered.shape[1:])


@functools.cache
def _leave_uncompiled() -> None:
    """Keep torch.compile out of `Documents.apply`, which it would compile anew for each batch.

    This imports the compiler, which takes a second and is not for those who keep nothing apart.
    """
    Documents.apply = torch.compiler.disable(Documents.apply)  # type: ignore[method-assign, no-untyped-call]


def padded_length(length: int) -> int:
    """Return the length to which a document of `length` tokens is padded: `2^a` or `3 * 2^a`."""
    octave = (length - 1).bit_length()  # 2^octave >= length
    shorter = 3 << max(0, octave - 2)
    return max(LEAST_PADDED, shorter if length <= shorter else 1 << octave)


class _Scattered(torch.autograd.Function):
    """Rows of `tensor [n, ..]` at `slots [n]` of a tensor of `num_slots` rows, zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, slots: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(slots)
        return tensor.new_zeros(num_slots, *tensor.shape[1:]).index_copy_(0, slots, tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None


class _Gathered(torch.autograd.Function):
    """Rows of `tensor [N, ..]` at `slots [n]`, which are different."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.num_slots = len(tensor)
        return tensor.index_select(0, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        padded = grad.new_zeros(ctx.num_slots, *grad.shape[1:])
        return padded.index_copy_(0, slots, grad), None
