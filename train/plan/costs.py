"""What a training step costs: multiply-adds, bytes between the ranks, and the time that makes."""

from stu.config import ModelConfig
from train.flops import num_parameters, token_flops, transforms
from train.gpus import Gpu
from train.parallel.config import ParallelConfig

USABLE_SHARE = 0.92
"""Of the memory: the driver and the allocator's gaps take the rest."""
PRODUCT_SHARE = 0.5
"""Of the peak, that matrix products of this size reach: an assumption, as the two below."""
FFT_SHARE = 0.6
"""Of the memory's bandwidth, that FFTs reach, each reading and writing its data once."""
HIDDEN_SHARE = 0.5
"""Of the exchange between ranks, that goes on while they compute."""


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
    transform, count = transforms(
        config, seq_len, micro_batch_size, parallel.checkpoint_activations
    )
    # Read and written once, with the copies into and out of it: float32, four times.
    fft_bytes = len(config.convolution_layers) * count * transform * 4 * 4.0
    convolutions = accumulated * fft_bytes / (FFT_SHARE * gpu.bytes_per_second)
    sent = exchanged_bytes(config, parallel, num_ranks, accumulated, is_half=True)
    exchange = (1 - HIDDEN_SHARE) * sent / gpu.network_bytes_per_second
    return products + convolutions + exchange
