"""`stu-plan`: memory, speed and duration of a run, and what would fit instead, without a GPU."""

import argparse
import math
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stu.common.errors import UserError, requires_extra

if TYPE_CHECKING:
    from train.parallel.config import ParallelConfig
    from train.plan.fits import Fits

GIB = 2**30
DAY_SECONDS = 86_400
LOG_COLUMNS = 110
DEFAULT_GPUS = 8
FAULT = 3
"""Exit code for a fault of this program."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if the run fits, 1 if not, 2 for wrong settings and 3 for a fault
    of this program."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="stu-plan",
        usage="stu-plan --gpu NAME --nodes N --gpus M --config FILE [--SETTING VALUE ...]",
        description="Show memory, speed and duration of a run of stu-train, whose settings follow. "
        "The exit code is 1 if it does not fit and 2 if a setting is wrong.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpu",
        default="h100-80g",
        help="GPU model: a100-40g, a100-80g, h100-80g, h200-141g, l40s-48g, or `this` for this "
        "machine's; if that is none of these, only the settings are checked",
    )
    parser.add_argument(
        "--nodes", type=_count, help="number of nodes, instead of trainer.num_nodes"
    )
    parser.add_argument(
        "--gpus",
        type=_count,
        help="GPUs on each node, instead of trainer.devices; 8 if neither is set",
    )
    parser.add_argument(
        "--tokens",
        type=_positive,
        help="tokens to train on, instead of those of trainer.max_steps steps",
    )
    options, others = parser.parse_known_args(arguments)
    try:
        with requires_extra("train"):  # modules that take seconds to import
            from train.config import data_warnings, num_devices
            from train.gpus import GPUS
            from train.settings import parse_settings

        if options.gpu not in (*GPUS, "this"):
            raise UserError("--gpu", options.gpu, f"one of {', '.join(GPUS)}, or this")
        settings = parse_settings(others)
        nodes = options.nodes or settings.trainer.num_nodes
        gpus = options.gpus or num_devices(settings.trainer) or DEFAULT_GPUS
        for text in data_warnings(settings, nodes * gpus):
            print(f"warning: {text}", file=sys.stderr)
        return plan(settings, options.gpu, nodes * gpus, options.tokens)
    except (UserError, OSError) as error:
        print(f"stu-plan: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Exception:  # Python's own exit code for these is 1, which means that the run is too big
        traceback.print_exc()
        return FAULT


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be a whole number >= 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be a positive number")
    return value


def plan(settings: Any, gpu_name: str, num_ranks: int, budget_tokens: float | None) -> int:
    """Print what to expect of a run with valid `settings`. Returns 1 if it does not fit, else 0."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from train.config import precision_name
    from train.flops import num_parameters, token_flops
    from train.gpus import GPUS, known_gpu
    from train.optimizer import optimizer_kind
    from train.plan.activations import fft_bytes
    from train.plan.costs import USABLE_SHARE, exchanged_bytes, step_seconds
    from train.plan.fits import Fits, stages

    if gpu_name == "this":
        known = known_gpu(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if known is None:
            print("stu-plan: the settings are valid; nothing is known about this machine's device")
            return 0
        gpu_name = known
    gpu = GPUS[gpu_name]
    config, parallel = settings.model.config, settings.parallel
    seq_len, micro_batch = settings.data.seq_len, settings.data.micro_batch_size
    accumulated = settings.trainer.accumulate_grad_batches
    is_half = precision_name(settings.trainer.precision) != "32-true"
    usable = USABLE_SHARE * gpu.memory_gib * GIB
    console = Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)
    state_bytes = optimizer_kind(settings.model.optimizer).state_bytes
    fits = Fits(config, seq_len, num_ranks, usable, is_half, state_bytes)
    flops = token_flops(config, seq_len, micro_batch, parallel.checkpoint_activations)
    console.print(
        f"{num_parameters(config) / 1e6:,.1f} M parameters; "
        f"{flops.total / 1e9:.2f} GFLOP per token: "
        f"dense {flops.dense / flops.total:.1%}, convolution "
        f"{flops.convolution / flops.total:.1%}, attention {flops.attention / flops.total:.1%}"
    )
    parts = ["weights", "gradients", "optimizer", "buffers", "activations"]
    table = Table(
        "",
        *parts,
        "FFTs",
        "total",
        "largest",
        title=f"GiB on each of {num_ranks} {gpu_name}, {seq_len:,} tokens x {micro_batch}, "
        f"{'bfloat16' if is_half else 'float32'}; "
        f"{usable / GIB:.1f} are usable",
    )
    ffts = fft_bytes(config, seq_len, micro_batch)
    for name, candidate in stages(parallel):
        memory = fits.memory(candidate, micro_batch)
        sizes = [*(getattr(memory, part) for part in parts), ffts, memory.total]
        mark = " <-" if candidate == parallel else ""
        largest = fits.largest(candidate)
        table.add_row(name + mark, *(f"{size / GIB:.2f}" for size in sizes), str(largest))
    console.print(table)
    console.print(
        "FFTs: those of one layer, part of the activations; largest: the largest micro-batch that "
        "fits"
    )
    tokens_per_step = num_ranks * accumulated * micro_batch * seq_len
    seconds = step_seconds(config, gpu, parallel, seq_len, micro_batch, accumulated, num_ranks)
    tokens = budget_tokens or settings.trainer.max_steps * tokens_per_step
    sent = exchanged_bytes(config, parallel, num_ranks, accumulated, is_half)
    console.print(
        f"{tokens_per_step:,} tokens per step, {sent / GIB:.1f} GiB sent by each rank; about "
        f"{seconds:.2f} s: {tokens_per_step / seconds:,.0f} tokens per second, "
        f"{tokens / (tokens_per_step / seconds) / DAY_SECONDS:.1f} days for {tokens / 1e9:.1f} G "
        "tokens (assuming half of the peak in products, 60% of the bandwidth in FFTs, and half of "
        "the exchange overlapped)"
    )
    if not is_half:
        console.print("Times are for bfloat16 (trainer.precision=bf16-mixed); float32 is slower")
    if fits.holds(parallel, micro_batch):
        return 0
    console.print(f"It does not fit. {_advice(fits, parallel, micro_batch)}")
    return 1


def _advice(fits: "Fits", parallel: "ParallelConfig", micro_batch: int) -> str:
    """Return a sentence with the settings nearest to `parallel` that fit."""
    from train.plan.fits import stages

    found = []
    for recomputes in (False, True):
        for name, candidate in stages(replace(parallel, checkpoint_activations=recomputes)):
            if name == "zero 0" and fits.is_half:  # it trains only in float32
                continue
            largest = fits.largest(candidate, most=micro_batch)
            if largest > 0:
                more = " and parallel.checkpoint_activations=true" if recomputes else ""
                found.append((-largest, recomputes, f"{name}, micro-batch {largest}{more}"))
    if not found:
        return "Nothing would on these GPUs: use more or larger ones, or a smaller model."
    return f"This would: {min(found)[2]}."


if __name__ == "__main__":
    sys.exit(main())
