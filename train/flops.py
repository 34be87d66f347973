"""Counts of a model's weights, and of the operations that training on one token takes."""

import functools
from dataclasses import dataclass

import torch

from stu.config import ModelConfig
from stu.layers import Costs
from stu.mixers import planned_mixers
from stu.model import Block, FlashSTU


@dataclass(frozen=True)
class TokenFlops:
    """Floating-point operations per token in forward and backward pass."""

    dense: float
    """Operations of products with weights."""
    convolution: float
    """Operations of FFTs."""
    attention: float
    """Operations of queries with keys, and of scores with values."""

    @property
    def total(self) -> float:
        """Sum over the kinds of operation."""
        return self.dense + self.convolution + self.attention


def token_flops(
    config: ModelConfig, seq_len: int, micro_batch_size: int, recomputes: bool
) -> TokenFlops:
    """Return the operations per token.

    recomputes: whether each block is computed again in the backward pass.
    """
    mixers = mixer_costs(config, seq_len, micro_batch_size, recomputes)
    # Reading the embedding is free. Its product, the logits, is never recomputed.
    head = config.vocab_size * config.width
    mixer_weights = sum(p.numel() for m in planned_mixers(config) for p in m.parameters())
    others = num_parameters(config) - head - mixer_weights
    dense = 2.0 * (4 if recomputes else 3) * others + 6.0 * head + mixers.dense
    return TokenFlops(dense, mixers.convolution, mixers.attention)


@functools.cache
def mixer_costs(
    config: ModelConfig, seq_len: int, micro_batch_size: int, recomputes: bool
) -> Costs:
    """Return the costs of all mixers per token, in both passes."""
    total = Costs()
    for mixer in planned_mixers(config):
        forward, backward = mixer.training_costs(seq_len, micro_batch_size)
        total += forward + backward
        if recomputes:
            total += forward
    return total


def num_parameters(config: ModelConfig) -> int:
    """Return the number of weights of the model."""
    outside = config.width * (config.vocab_size + 1)  # the embedding and the last norm
    return outside + sum(block_parameters(config))


@functools.cache
def block_parameters(config: ModelConfig) -> tuple[int, ...]:
    """Return the number of weights of each block."""
    with torch.device("meta"):
        made = {name: Block(config, name) for name in dict.fromkeys(config.mixers)}
    counts = {name: sum(p.numel() for p in block.parameters()) for name, block in made.items()}
    return tuple(counts[name] for name in config.mixers)


def matrix_share(config: ModelConfig) -> float:
    """Return the share of the model's weights that is in its `linear_maps`."""
    with torch.device("meta"):
        model = FlashSTU(config)
    count = sum(model.get_parameter(name).numel() for name in model.linear_maps)
    return count / model.num_parameters()
