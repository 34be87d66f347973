"""Counts of a model's weights, and of the operations that training on one token takes."""

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from stu.config import ModelConfig
from stu.convolution import fast_fft_length
from stu.hyena import ImplicitFilter
from stu.model import FlashSTU


@dataclass(frozen=True)
class TokenFlops:
    """Multiplications and additions per token in forward and backward pass."""

    dense: float
    convolution: float
    attention: float

    @property
    def total(self) -> float:
        """Sum over the kinds of operation."""
        return self.dense + self.convolution + self.attention


@functools.cache
def token_flops(
    config: ModelConfig, seq_len: int, micro_batch_size: int, recomputes: bool
) -> TokenFlops:
    """Return the operations per token.

    recomputes: whether each block is computed again in the backward pass.
    """
    passes = 4 if recomputes else 3
    # Reading the embedding is free. Its product, the logits, is never recomputed.
    head = config.vocab_size * config.width
    # The network behind Hyena's filters runs over lags: once for all sequences of a batch.
    implicit = num_filter_parameters(config)
    weights = num_parameters(config) - head - implicit + implicit / micro_batch_size
    dense = 2.0 * passes * weights + 6.0 * head
    window = sum(min(i, config.window_tokens) + 1 for i in range(seq_len)) / seq_len
    attention = len(config.attention_layers) * 4.0 * window * config.width * (passes + 0.5)
    transform, count = transforms(config, seq_len, micro_batch_size, recomputes)
    flops = 2.5 * transform * math.log2(transform)
    tokens = seq_len * micro_batch_size
    return TokenFlops(dense, len(config.convolution_layers) * count * flops / tokens, attention)


@functools.cache
def num_parameters(config: ModelConfig) -> int:
    """Return the number of weights of the model."""
    outside = config.width * (config.vocab_size + 1)  # the embedding and the last norm
    return outside + sum(block.parameters for block in _blocks(config))


@functools.cache
def num_filter_parameters(config: ModelConfig) -> int:
    """Return the number of weights that Hyena's filters are computed from."""
    return sum(block.filter_parameters for block in _blocks(config))


@functools.cache
def max_block_parameters(config: ModelConfig) -> int:
    """Return the number of weights of the largest block."""
    return max(block.parameters for block in _blocks(config))


class _Block(NamedTuple):
    parameters: int
    filter_parameters: int


def _blocks(config: ModelConfig) -> list[_Block]:
    """Return all blocks of a model; only one of each kind is built, on the meta device."""
    few = replace(config, num_layers=min(config.num_layers, layer_period(config)))
    with torch.device("meta"):
        made = FlashSTU(few).blocks
    kinds = []
    for block in made:
        filters = [m for m in block.modules() if isinstance(m, ImplicitFilter)]
        kinds.append(
            _Block(
                sum(p.numel() for p in block.parameters()),
                sum(p.numel() for m in filters for p in m.parameters()),
            )
        )
    return [kinds[i % len(kinds)] for i in range(config.num_layers)]


def layer_period(config: ModelConfig) -> int:
    """Return the number of layers after which the kinds of blocks repeat."""
    return 2 if config.layout == "hybrid" else 1


def convolution_shape(config: ModelConfig, micro_batch_size: int) -> tuple[int, int, int]:
    """Return streams, channels per stream, and the lag step of a layer's long convolution."""
    form = config.stu_form if config.stu_layers else None
    channels = 2 * config.num_filters if form == "full" else config.width
    lag_step = 2 if form == "tensordot" else 1
    return micro_batch_size * config.streams_per_sequence, channels, lag_step


def transforms(
    config: ModelConfig, seq_len: int, micro_batch_size: int, recomputes: bool
) -> tuple[int, int]:
    """Return length and number of a layer's FFTs in both passes (inputs, taps, inverse)."""
    streams, channels, lag_step = convolution_shape(config, micro_batch_size)
    per_phase = -(-seq_len // lag_step)
    sequences = lag_step * streams
    forward, backward = 2 * sequences + 1, 3 * sequences + 2
    count = channels * (forward * (2 if recomputes else 1) + backward)
    return fast_fft_length(2 * per_phase - 1), count
