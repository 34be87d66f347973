"""Bytes that ranks exchange in a training step, and the time that a step takes."""

from stu.config import ModelConfig
from train.flops import matrix_share, mixer_costs, num_parameters, token_flops
from train.gpus import Gpu
from train.parallel.config import ParallelConfig
from train.plan.activations import slice_bytes

USABLE_SHARE = 0.92
"""Usable share of the memory; the driver and the allocator's gaps take the rest."""
PRODUCT_SHARE = 0.5
"""Share of the peak that matrix products reach: an assumption, as are the next two."""
FFT_SHARE = 0.6
"""Share of the memory's bandwidth that FFTs reach."""
HIDDEN_SHARE = 0.5
"""Share of the exchange between ranks that overlaps with computation."""
UPDATE_BYTES = 2
"""Bytes of an element of a matrix's update on GPUs, where it is bfloat16."""


def exchanged_bytes(
    config: ModelConfig, parallel: ParallelConfig, num_ranks: int, accumulated: int, is_half: bool
) -> float:
    """Return the bytes of weights and gradients that each rank sends in a step. A ring sends
    `(N - 1) / N` of what it reduces or gathers.

    accumulated: micro-batches of a step.
    """
    if parallel.kind == "fsdp":  # weights in both passes, gradients in float32
        weights = (2 if is_half else 4) * 2
        return accumulated * (weights + 4) * num_parameters(config) * (num_ranks - 1) / num_ranks
    width = 2 if is_half and parallel.kind == "zero" else 4
    once = width * num_parameters(config) * (num_ranks - 1) / num_ranks
    if parallel.kind == "zero" and parallel.zero_stage == 3:
        return once * (1 + 2 * accumulated)  # weights in both passes of each micro-batch
    return 2 * once


def update_bytes(config: ModelConfig, parallel: ParallelConfig, num_ranks: int) -> float:
    """Return the bytes that each rank sends in a step if the optimizer updates whole matrices
    (`train.optimizer.matrices`)."""
    count = matrix_share(config) * num_parameters(config)
    copied = UPDATE_BYTES * count * (num_ranks - 1) / num_ranks
    has_parts = parallel.kind == "fsdp" or (parallel.kind == "zero" and parallel.zero_stage > 0)
    return copied * 2 / num_ranks if has_parts else copied  # parts go there and back


def step_seconds(
    config: ModelConfig,
    gpu: Gpu,
    parallel: ParallelConfig,
    seq_len: int,
    micro_batch_size: int,
    accumulated: int,
    num_ranks: int,
    num_nodes: int,
    exchanges_matrices: bool = False,
) -> float:
    """Return the seconds of an optimizer step in bfloat16, under the shares assumed above."""
    work = seq_len, micro_batch_size, parallel.checkpoint_activations
    flops = token_flops(config, *work)
    tokens = accumulated * micro_batch_size * seq_len / parallel.context
    products = tokens * (flops.dense + flops.attention) / (PRODUCT_SHARE * gpu.flops)
    moved = tokens * mixer_costs(config, *work).fft_bytes
    convolutions = moved / (FFT_SHARE * gpu.bytes_per_second)
    sent = exchanged_bytes(config, parallel, num_ranks, accumulated, is_half=True)
    slices = seq_len, micro_batch_size, parallel.context
    sent += accumulated * slice_bytes(config, *slices, is_half=True)
    if exchanges_matrices:
        sent += update_bytes(config, parallel, num_ranks)
    within = num_nodes == 1
    bandwidth = gpu.link_bytes_per_second if within else gpu.network_bytes_per_second
    exchange = (1 - HIDDEN_SHARE) * sent / bandwidth
    return products + convolutions + exchange
