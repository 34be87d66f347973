"""What a training step costs: multiply-adds, bytes between the ranks, and the time that makes."""

import functools
import math
import re
from dataclasses import dataclass

import torch

from stu.config import ModelConfig
from stu.convolution import fast_fft_length
from train.parallel.config import ParallelConfig
from train.plan.memory import convolution_shape, num_filter_parameters, num_parameters


@dataclass(frozen=True)
class Gpu:
    """One kind of accelerator, from its maker's data sheet."""

    cuda_name: str
    """That CUDA's own name of it contains."""
    memory_gib: float
    flops: float
    """In bfloat16 with float32 sums, dense, a second."""
    bytes_per_second: float
    """Of its own memory."""
    network_bytes_per_second: float
    """To other nodes, each way, for one GPU of a usual host."""


GPUS = {
    "a100-40g": Gpu("A100", 40, 312e12, 1.56e12, 25e9),
    "a100-80g": Gpu("A100", 80, 312e12, 2.04e12, 25e9),
    "h100-80g": Gpu("H100", 80, 989e12, 3.35e12, 50e9),
    "h200-141g": Gpu("H200", 141, 989e12, 4.8e12, 50e9),
    "l40s-48g": Gpu("L40S", 48, 362e12, 0.864e12, 12.5e9),
}
"""NVIDIA's data sheets of A100, H100 SXM, H200 and L40S. Networks are those of DGX hosts, 200 and
400 Gbit/s for a GPU, and 100 Gbit/s."""
MEMORY_TOLERANCE = 0.1
"""Of the memory that CUDA tells, which is less than that of the data sheet."""
USABLE_SHARE = 0.92
"""Of the memory: the driver and the allocator's gaps take the rest."""
PRODUCT_SHARE = 0.5
"""Of the peak, that matrix products of this size reach: an assumption, as the two below."""
FFT_SHARE = 0.6
"""Of the memory's bandwidth, that FFTs reach, each reading and writing its data once."""
HIDDEN_SHARE = 0.5
"""Of the exchange between ranks, that goes on while they compute."""


@dataclass(frozen=True)
class TokenFlops:
    """Multiplications and additions of one token, forward and backward."""

    dense: float
    convolution: float
    attention: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.dense + self.convolution + self.attention


@functools.cache
def token_flops(
    config: ModelConfig, seq_len: int, micro_batch_size: int, recomputes: bool
) -> TokenFlops:
    """recomputes: whether each block is computed again in the backward pass."""
    passes = 4 if recomputes else 3
    # The embedding is read, which costs nothing, and makes logits, which does, once.
    head = config.vocab_size * config.width
    # What makes Hyena's filters goes over lags, not tokens: once for all sequences of a batch.
    implicit = num_filter_parameters(config)
    of_token = num_parameters(config) - head - implicit + implicit / micro_batch_size
    dense = 2.0 * passes * of_token + 6.0 * head
    window = sum(min(i, config.window_tokens) + 1 for i in range(seq_len)) / seq_len
    attention = len(config.attention_layers) * 4.0 * window * config.width * (passes + 0.5)
    transform, count = _transforms(config, seq_len, micro_batch_size, recomputes)
    flops = 2.5 * transform * math.log2(transform)
    tokens = seq_len * micro_batch_size
    return TokenFlops(dense, len(config.convolution_layers) * count * flops / tokens, attention)


def known_gpu(device: torch.device) -> str | None:
    """Its name above, if it has one: one of another size may be another in all."""
    if device.type != "cuda":
        return None
    its = torch.cuda.get_device_properties(device)
    memory_gib = its.total_memory / 2**30
    for name, gpu in GPUS.items():
        is_named = re.search(rf"\b{gpu.cuda_name}\b", its.name)
        if is_named and math.isclose(memory_gib, gpu.memory_gib, rel_tol=MEMORY_TOLERANCE):
            return name
    return None


def exchanged_bytes(
    config: ModelConfig, parallel: ParallelConfig, num_ranks: int, accumulated: int, is_half: bool
) -> float:
    """That a rank sends in a step; a ring's are `(N-1)/N` of what is summed or gathered."""
    if parallel.kind == "fsdp":  # weights in both passes, gradients in float32
        weights = (2 if is_half else 4) * 2
        return accumulated * (weights + 4) * num_parameters(config) * (num_ranks - 1) / num_ranks
    width = 2 if is_half and parallel.kind == "zero" else 4
    once = width * num_parameters(config) * (num_ranks - 1) / num_ranks
    if parallel.kind == "zero" and parallel.zero_stage == 3:
        return once * (1 + 2 * accumulated)  # weights in both passes of each micro-batch
    return 2 * once


def step_seconds(
    config: ModelConfig,
    gpu: Gpu,
    parallel: ParallelConfig,
    seq_len: int,
    micro_batch_size: int,
    accumulated: int,
    num_ranks: int,
) -> float:
    """Of one optimizer step in bfloat16, from the shares assumed above."""
    flops = token_flops(config, seq_len, micro_batch_size, parallel.checkpoint_activations)
    tokens = accumulated * micro_batch_size * seq_len
    products = tokens * (flops.dense + flops.attention) / (PRODUCT_SHARE * gpu.flops)
    transform, count = _transforms(
        config, seq_len, micro_batch_size, parallel.checkpoint_activations
    )
    # Read and written once, with the copies into and out of it: float32, four times.
    fft_bytes = len(config.convolution_layers) * count * transform * 4 * 4.0
    convolutions = accumulated * fft_bytes / (FFT_SHARE * gpu.bytes_per_second)
    sent = exchanged_bytes(config, parallel, num_ranks, accumulated, is_half=True)
    exchange = (1 - HIDDEN_SHARE) * sent / gpu.network_bytes_per_second
    return products + convolutions + exchange


def _transforms(
    config: ModelConfig, seq_len: int, micro_batch_size: int, recomputes: bool
) -> tuple[int, int]:
    """Length of a layer's FFTs, and how many go over it: those of inputs, of taps, and back, in
    both passes (`stu.convolution`)."""
    streams, channels, lag_step = convolution_shape(config, micro_batch_size)
    per_phase = -(-seq_len // lag_step)
    sequences = lag_step * streams
    forward, backward = 2 * sequences + 1, 3 * sequences + 2
    count = channels * (forward * (2 if recomputes else 1) + backward)
    return fast_fft_length(2 * per_phase - 1), count
