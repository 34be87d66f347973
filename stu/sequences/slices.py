"""Slices of sequences that ranks divide: each rank computes as many neighbouring tokens of each."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stu.convolution import after_zeros, causal_convolution, short_convolution
from stu.sequences.base import Sequences
from stu.slices.ranks import SliceRanks, exchange, with_earlier
from stu.slices.states import slice_states

if TYPE_CHECKING:
    from stu.mixers import LongConvolution, Mixer, WindowAttention


class SequenceSlices(Sequences):
    """This rank's slices of sequences. Operations are collective, as all ranks compute theirs."""

    def __init__(self, ranks: SliceRanks) -> None:
        self.ranks = ranks

    def length(self, num_tokens: int) -> int:
        return self.ranks.size * num_tokens

    def convolve(self, layer: "LongConvolution", inputs: Tensor, filters: Tensor) -> Tensor:
        if layer.past.basis is None:
            mixed = self._convolve_by_channels(layer, layer.streams(inputs), filters)
        else:
            streams = layer.streams(inputs)
            mixed = self.ranks.uncompiled(self._convolve_by_states, layer, streams, filters)
        return layer.joined(mixed)

    def convolve_short(self, layer: "Mixer", inputs: Tensor, taps: Tensor) -> Tensor:
        length, last = inputs.shape[1], len(taps) - 1
        padded = after_zeros(with_earlier(self.ranks, inputs, last), len(taps))
        return short_convolution(padded[:, -(last + length) :], taps)

    def attend(
        self, layer: "WindowAttention", queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        both = torch.stack([keys, values], dim=2)
        queries = queries.contiguous()  # a view would keep the keys and values alive twice
        keys, values = with_earlier(self.ranks, both, layer.window.window_tokens).unbind(2)
        return layer.attended(queries, keys, values)

    def _convolve_by_channels(
        self, layer: "LongConvolution", streams: Tensor, filters: Tensor
    ) -> Tensor:
        """Exchange slices `[S, T, C]` for channels, and convolve whole sequences of a share."""
        ranks, channels = self.ranks, streams.shape[2]
        whole = all_positions(ranks, streams)
        taps = layer.channel_taps(filters[: whole.shape[1]], ranks.channels(channels))
        mixed = causal_convolution(whole, taps, layer.past.lag_step)
        return all_channels(ranks, mixed, channels)

    def _convolve_by_states(
        self, layer: "LongConvolution", streams: Tensor, filters: Tensor
    ) -> Tensor:
        """Convolve slices `[S, T, C]`, and add what follows from the states that earlier ranks
        send."""
        length, step = streams.shape[1], layer.past.lag_step
        wide = streams.to(torch.promote_types(streams.dtype, torch.float32))
        with torch.autocast(streams.device.type, enabled=False):
            own = causal_convolution(wide, layer.taps(filters[:length]), step)
            states = slice_states(self.ranks, filters, layer.basis, length, step, wide.dtype)
            _, weights = layer.basis(filters[:length])
            if weights is None:  # all channels of a stream have one input
                added = states.alternating(wide[..., 0])
            else:
                added = states.mixed(wide, weights)
        return (own + added).to(streams.dtype)


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
