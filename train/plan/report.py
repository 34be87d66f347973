"""The plan of a run as text: work and memory of its model, speed, and settings that would fit."""

import sys
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stu.config import ModelConfig
from train.config import precision_name
from train.flops import matrix_share, num_parameters, token_flops
from train.gpus import GPUS, known_gpu
from train.optimizer import optimizer_kind
from train.parallel.config import ParallelConfig
from train.plan.activations import fft_bytes, slice_bytes
from train.plan.costs import USABLE_SHARE, exchanged_bytes, step_seconds, update_bytes
from train.plan.fits import Fits, stages
from train.plan.serving import evaluation_bytes

GIB = 2**30
DAY_SECONDS = 86_400
LOG_COLUMNS = 110
PARTS = ("weights", "gradients", "optimizer", "buffers", "activations")


def show_plan(
    settings: Any, gpu_name: str, num_ranks: int, num_nodes: int, budget_tokens: float | None
) -> int:
    """Print what to expect of a run with valid `settings`. Returns 1 if it does not fit, else 0."""
    if gpu_name == "this":
        known = known_gpu(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if known is None:
            print("stu-plan: the settings are valid; nothing is known about this machine's device")
            return 0
        gpu_name = known
    config, parallel, data = settings.model.config, settings.parallel, settings.data
    parallel.check_ranks(num_ranks)
    is_half = precision_name(settings.trainer.precision) != "32-true"
    usable = USABLE_SHARE * GPUS[gpu_name].memory_gib * GIB
    state_bytes = optimizer_kind(settings.model.optimizer).state_bytes(matrix_share(config))
    is_apart = data.documents == "apart"
    evaluation, held = settings.evaluation, 0
    if evaluation.task_names:
        engine = evaluation.engine
        held = evaluation_bytes(config, is_half, evaluation.cache_gib, engine.max_running)
    fits = Fits(config, data.seq_len, num_ranks, usable, is_half, state_bytes, is_apart, held)
    console = Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)
    work = data.seq_len, data.micro_batch_size, parallel.checkpoint_activations
    console.print(_describe_model(config, *work))
    console.print(_memory_table(fits, parallel, data.micro_batch_size, gpu_name))
    console.print(
        "FFTs: those of one layer, included in activations; largest: the largest micro-batch that "
        "fits"
    )
    if held:
        console.print(
            f"total: with the larger of activations and an evaluation on tasks, {held / GIB:.2f} "
            "GiB for a copy of the model and an engine between two steps"
        )
    ranks = num_ranks, num_nodes
    console.print(_describe_speed(settings, gpu_name, *ranks, is_half, budget_tokens))
    if not is_half:
        console.print("Times are for bfloat16 (trainer.precision=bf16-mixed); float32 is slower")
    if fits.holds(parallel, data.micro_batch_size):
        return 0
    console.print(f"It does not fit. {_advice(fits, parallel, data.micro_batch_size)}")
    return 1


def _describe_model(config: ModelConfig, seq_len: int, micro_batch: int, recomputes: bool) -> str:
    flops = token_flops(config, seq_len, micro_batch, recomputes)
    return (
        f"{num_parameters(config) / 1e6:,.1f} M parameters; "
        f"{flops.total / 1e9:.2f} GFLOP per token: "
        f"dense {flops.dense / flops.total:.1%}, convolution "
        f"{flops.convolution / flops.total:.1%}, attention {flops.attention / flops.total:.1%}"
    )


def _memory_table(fits: Fits, parallel: ParallelConfig, micro_batch: int, gpu_name: str) -> Table:
    """Return a table with a row for each kind of parallelism and ZeRO stage."""
    divided = f" on {parallel.context} ranks" if parallel.context > 1 else ""
    table = Table(
        *("", *PARTS, "FFTs", "total", "largest"),
        title=f"GiB on each of {fits.num_ranks} {gpu_name}, {fits.seq_len:,} tokens x "
        f"{micro_batch}{divided}, {'bfloat16' if fits.is_half else 'float32'}; "
        f"{fits.usable_bytes / GIB:.1f} are usable",
    )
    ffts = fft_bytes(fits.config, fits.seq_len, micro_batch, parallel.context)
    for name, candidate in stages(parallel):
        memory = fits.memory(candidate, micro_batch)
        sizes = [*(getattr(memory, part) for part in PARTS), ffts, memory.total]
        mark = " <-" if candidate == parallel else ""
        largest = fits.largest(candidate)
        table.add_row(name + mark, *(f"{size / GIB:.2f}" for size in sizes), str(largest))
    return table


def _describe_speed(
    settings: Any,
    gpu_name: str,
    num_ranks: int,
    num_nodes: int,
    is_half: bool,
    budget_tokens: float | None,
) -> str:
    config, parallel, data = settings.model.config, settings.parallel, settings.data
    batches = data.micro_batch_size, settings.trainer.accumulate_grad_batches
    groups = num_ranks // parallel.context
    tokens_per_step = groups * data.seq_len * batches[0] * batches[1]
    matrices = optimizer_kind(settings.model.optimizer).matrix_state_tensors is not None
    work = data.seq_len, *batches, num_ranks, num_nodes
    seconds = step_seconds(config, GPUS[gpu_name], parallel, *work, exchanges_matrices=matrices)
    tokens = budget_tokens or settings.trainer.max_steps * tokens_per_step
    sent = exchanged_bytes(config, parallel, num_ranks, batches[1], is_half)
    slices = slice_bytes(config, data.seq_len, batches[0], parallel.context, is_half)
    sent += batches[1] * slices
    if matrices:
        sent += update_bytes(config, parallel, num_ranks)
    return (
        f"{tokens_per_step:,} tokens per step, {sent / GIB:.1f} GiB sent by each rank; about "
        f"{seconds:.2f} s: {tokens_per_step / seconds:,.0f} tokens per second, "
        f"{tokens / (tokens_per_step / seconds) / DAY_SECONDS:.1f} days for {tokens / 1e9:.1f} G "
        "tokens (assuming 50% of the peak in matrix products, 60% of the bandwidth in FFTs, and "
        "half of the communication overlapped)"
    )


def _advice(fits: Fits, parallel: ParallelConfig, micro_batch: int) -> str:
    """Return a sentence with the settings nearest to `parallel` that fit."""
    found = []
    for recomputes in (False, True):
        for name, candidate in stages(replace(parallel, checkpoint_activations=recomputes)):
            if name == "zero 0" and fits.is_half:  # it trains only in float32
                continue
            largest = fits.largest(candidate, most=micro_batch)
            if largest > 0:
                more = " and parallel.checkpoint_activations=true" if recomputes else ""
                found.append((-largest, recomputes, f"{name}, micro-batch {largest}{more}"))
    if found:
        return f"This would: {min(found)[2]}."
    if replace(fits, evaluation=0).holds(parallel, micro_batch):
        return (
            "The run alone would: lower evaluation.cache_gib, or evaluate by stu-eval afterwards."
        )
    return "No setting fits on these GPUs: use more or larger GPUs, or a smaller model."
