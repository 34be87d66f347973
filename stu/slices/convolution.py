"""Convolutions over slices of sequences, for any taps."""

from collections.abc import Callable

import torch
from torch import Tensor

from stu.convolution import after_zeros, causal_convolution, short_convolution
from stu.slices.ranks import SliceRanks, exchange, with_earlier


def convolve_short_slices(ranks: SliceRanks, inputs: Tensor, taps: Tensor) -> Tensor:
    """Convolve slices with a few taps, with the last positions of earlier ranks: `[B, S, C]` with
    `[J, C]`."""
    length, last = inputs.shape[1], len(taps) - 1
    padded = after_zeros(with_earlier(ranks, inputs, last), len(taps))
    return short_convolution(padded[:, -(last + length) :], taps)


def convolve_by_channels(
    ranks: SliceRanks, inputs: Tensor, taps: Callable[[slice], Tensor], lag_step: int
) -> Tensor:
    """Convolve slices `[B, S, C]`: ranks exchange them for channels, and each convolves whole
    sequences of its share.

    taps: Function that computes the taps `[N, share]` of some channels.
    """
    channels = inputs.shape[2]
    whole = all_positions(ranks, inputs)
    mixed = causal_convolution(whole, taps(ranks.channels(channels)), lag_step)
    return all_channels(ranks, mixed, channels)


def all_positions(ranks: SliceRanks, x: Tensor) -> Tensor:
    """Give all positions of this rank's share of the channels for this rank's positions of all:
    `[B, S, C] -> [B, n S, share]`."""
    parts = [x[..., ranks.channels(x.shape[2], other)] for other in range(ranks.size)]
    shape = parts[ranks.rank].shape
    return torch.cat(exchange(ranks, parts, [shape] * ranks.size), dim=1)


def all_channels(ranks: SliceRanks, x: Tensor, count: int) -> Tensor:
    """Give back, out of `count` channels: `[B, n S, share] -> [B, S, C]`."""
    parts = x.chunk(ranks.size, dim=1)
    shares = [ranks.channels(count, other) for other in range(ranks.size)]
    shapes = [(*parts[0].shape[:2], share.stop - share.start) for share in shares]
    return torch.cat(exchange(ranks, parts, shapes), dim=2)
