"""What a decoded token costs, counted by formula: multiply-adds, and bytes moved.

Multiply-adds are real ones of one sequence; where FFTs are, those of `stu.futurefill`: a real FFT
of length n counts n log2 n, a complex product four. Bytes moved are what an ideal machine without
any processor cache reads and writes of weights, filters and caches, a state in every operation that
goes over it; copies, activations and FFT work space are not counted. Weights and filters are read
once for all sequences of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stu.config import ModelConfig
from stu.hyena import SHORT_TAPS

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Costs:
    """Of one token of one sequence, on average over a run."""

    dense: float
    """Multiply-adds of matrices with vectors."""
    convolution: float = 0.0
    """Multiply-adds of inputs with filters."""
    fft: float = 0.0
    """Multiply-adds of FFTs and of the products between them."""
    attention: float = 0.0
    """Multiply-adds of queries with keys, and of scores with values."""
    recurrence: float = 0.0
    """Multiply-adds that update a state and read it."""
    filter_bytes: float = 0.0
    """Filters, or what is kept of them, read in a step for the whole batch."""
    cache_read: float = 0.0
    """Bytes."""
    cache_written: float = 0.0
    """Bytes."""
    streams: float = 0.0
    """Of memory, far from each other: pasts of channels, and a share of the filters they meet."""

    def report(self, weight_bytes: int, batch: int) -> dict[str, Any]:
        """Figures of a result."""
        multiply_adds = {
            "dense": self.dense,
            "convolution": self.convolution,
            "fft": self.fft,
            "attention": self.attention,
            "recurrence": self.recurrence,
        }
        moved = {
            "weights": weight_bytes / batch,
            "filters": self.filter_bytes / batch,
            "cache_read": self.cache_read,
            "cache_written": self.cache_written,
        }
        return {
            "multiply_adds_per_token": multiply_adds | {"total": sum(multiply_adds.values())},
            "bytes_moved_per_token": moved | {"total": sum(moved.values())},
            "streams_per_token": self.streams,
        }


def dense_multiply_adds(config: ModelConfig) -> int:
    """Of a Flash-STU block's matrices and the tied unembedding (`stu.layers`, `stu.model`).

    STU-T projects with one D x D matrix, attention and Hyena with four in all, the gated MLP has
    three of `D x mlp_ratio D` (Liu et al. 2024, arXiv:2409.10489; Poli et al. 2023,
    arXiv:2302.10866).
    """
    square = config.width**2
    per_convolution = 4 if config.layout == "hyena" else 1
    mixers = 4 * len(config.attention_layers)
    mixers += per_convolution * len(config.convolution_layers)
    mlps = 3 * config.mlp_ratio * config.num_layers
    return (mixers + mlps) * square + config.vocab_size * config.width


def attention_multiply_adds(width: int, num_layers: int, keys_seen: Sequence[int]) -> float:
    """`q.k` and `scores.v` take D each for a key (Vaswani et al. 2017, equation 1); the mean over
    tokens that see so many keys."""
    return 2 * width * num_layers * sum(keys_seen) / len(keys_seen)


def attention_bytes(
    width: int, num_layers: int, keys_seen: Sequence[int], number_bytes: int = FLOAT_BYTES
) -> tuple[float, float]:
    """Read and written for a token: a key and a value of each token seen, and its own."""
    position = 2 * width * num_layers * number_bytes
    return position * sum(keys_seen) / len(keys_seen), float(position)


def window_costs(
    config: ModelConfig, prompt_tokens: int, new_tokens: int, number_bytes: int = FLOAT_BYTES
) -> Costs:
    """Sliding windows, and Hyena's short convolutions of three projections, besides `dense`.
    number_bytes: of each number of the activations, which are what these remember."""
    last = prompt_tokens + new_tokens
    keys = [min(config.window_tokens + 1, t + 1) for t in range(prompt_tokens, last)]
    layers = len(config.attention_layers)
    read, written = attention_bytes(config.width, layers, keys, number_bytes)
    short, short_read, short_written = 0, 0, 0
    if config.layout == "hyena":
        channels = 3 * config.width * len(config.convolution_layers)
        short = SHORT_TAPS * channels
        short_read = (SHORT_TAPS - 1) * channels * number_bytes
        short_written = channels * number_bytes
    return Costs(
        dense=dense_multiply_adds(config),
        convolution=short,
        attention=attention_multiply_adds(config.width, layers, keys),
        cache_read=read + short_read,
        cache_written=written + short_written,
    )
