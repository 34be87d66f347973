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
from stu.mixers import KeyWindow, LastInputs, planned_mixers, remembered

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
    """Multiply-adds of a token with the matrices of all blocks and with the tied unembedding."""
    mixers = sum(mixer.decoding_weights for mixer in planned_mixers(config))
    mlps = 3 * config.mlp_ratio * config.num_layers * config.width**2
    return mixers + mlps + config.vocab_size * config.width


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
    """Costs of matrices, attention windows and short convolutions, whose memory holds numbers of
    `number_bytes` layer."""
    mixers, last = planned_mixers(config), prompt_tokens + new_tokens
    keys = [min(config.window_tokens + 1, t + 1) for t in range(prompt_tokens, last)]
    layers = len(remembered(mixers, KeyWindow))
    read, written = attention_bytes(config.width, layers, keys, number_bytes)
    short = remembered(mixers, LastInputs)
    return Costs(
        dense=dense_multiply_adds(config),
        convolution=sum(layer.num_taps * layer.channels for layer in short),
        attention=attention_multiply_adds(config.width, layers, keys),
        cache_read=read
        + sum((layer.num_taps - 1) * layer.channels for layer in short) * number_bytes,
        cache_written=written + sum(layer.channels for layer in short) * number_bytes,
    )
