"""`stu-plan`: does a run fit, how fast will it be, and what would fit instead. Without any GPU."""

import argparse
import math
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stu.config import ModelConfig
    from train.parallel.config import ParallelConfig
    from train.plan.fits import Fits

GIB = 2**30
DAY_SECONDS = 86_400
LOG_COLUMNS = 110
DEFAULT_GPUS = 8
FAULT = 3
"""Exit code of a fault of this program."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 if it fits, 1 if not, 2 for wrong settings, 3 for a fault of our own."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="stu-plan",
        usage="stu-plan --gpu NAME --nodes N --gpus M --config FILE [--SETTING VALUE ...]",
        description="Memory, speed and days of a run of stu-train, whose settings follow. "
        "Exit code 1 if it does not fit, 2 if a setting is wrong.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpu",
        default="h100-80g",
        help="a100-40g, a100-80g, h100-80g, .., or `this`: the one here; with none that is known, "
        "settings are checked alone",
    )
    parser.add_argument("--nodes", type=_count, help="in place of trainer.num_nodes")
    parser.add_argument(
        "--gpus", type=_count, help="of each node, in place of trainer.devices; 8 if neither says"
    )
    parser.add_argument(
        "--tokens", type=_positive, help="to train on; without it, those of max_steps"
    )
    given, others = parser.parse_known_args(arguments)
    # Imported late, for it takes seconds.
    from train.config import data_warnings, num_devices
    from train.gpus import GPUS
    from train.run import parse_settings
    from train.start.agreement import UserError

    try:
        if given.gpu not in (*GPUS, "this"):
            raise UserError(f"gpu={given.gpu} is not known: choose from {', '.join(GPUS)}, or this")
        settings = parse_settings(others)
    except (UserError, OSError) as error:
        print(f"stu-plan: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    nodes = given.nodes or settings.trainer.num_nodes
    gpus = given.gpus or num_devices(settings.trainer) or DEFAULT_GPUS
    try:
        for text in data_warnings(settings, nodes * gpus):
            print(f"warning: {text}", file=sys.stderr)
        return plan(settings, given.gpu, nodes * gpus, given.tokens)
    except Exception:  # Python's own code for these, 1, says that the run does not fit
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
    """Print what is to be expected of settings that were checked; 1 if the run does not fit."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from train.config import precision_name
    from train.flops import token_flops
    from train.gpus import GPUS, known_gpu
    from train.optimizer import optimizer_kind
    from train.plan.costs import USABLE_SHARE, exchanged_bytes, step_seconds
    from train.plan.fits import Fits, stages
    from train.plan.memory import fft_bytes

    if gpu_name == "this":
        known = known_gpu(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if known is None:
            print("stu-plan: the settings are valid; of this machine's device nothing is known")
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
        f"{_millions(config)} M parameters; {flops.total / 1e9:.2f} GFLOP a token: "
        f"dense {flops.dense / flops.total:.1%}, convolution "
        f"{flops.convolution / flops.total:.1%}, attention {flops.attention / flops.total:.1%}"
    )
    table = Table(
        "",
        "weights",
        "gradients",
        "optimizer",
        "buffers",
        "activations",
        "FFTs",
        "total",
        "largest",
        title=f"GiB on each of {num_ranks} {gpu_name}, {seq_len:,} tokens x {micro_batch}, "
        f"{'bfloat16' if is_half else 'float32'}; "
        f"{usable / GIB:.1f} are usable",
    )
    ffts = fft_bytes(config, seq_len, micro_batch)
    for name, other in stages(parallel):
        memory = fits.memory(other, micro_batch)
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.buffers)
        values = [f"{part / GIB:.2f}" for part in (*parts, memory.activations, ffts, memory.total)]
        mark = " <-" if other == parallel else ""
        table.add_row(name + mark, *values, str(fits.largest(other)))
    console.print(table)
    console.print(
        "FFTs: one layer's, among the activations; largest: the largest micro-batch that fits"
    )
    tokens_per_step = num_ranks * accumulated * micro_batch * seq_len
    seconds = step_seconds(config, gpu, parallel, seq_len, micro_batch, accumulated, num_ranks)
    tokens = budget_tokens or settings.trainer.max_steps * tokens_per_step
    sent = exchanged_bytes(config, parallel, num_ranks, accumulated, is_half)
    console.print(
        f"{tokens_per_step:,} tokens a step, {sent / GIB:.1f} GiB sent by each rank; about "
        f"{seconds:.2f} s: {tokens_per_step / seconds:,.0f} tokens a second, "
        f"{tokens / (tokens_per_step / seconds) / DAY_SECONDS:.1f} days for {tokens / 1e9:.1f} G "
        "tokens (assumed: half of the peak in products, 60% of the bandwidth in FFTs, half of the "
        "exchange hidden)"
    )
    if not is_half:
        console.print("Times are of bfloat16 (trainer.precision=bf16-mixed); float32 takes longer")
    if fits.holds(parallel, micro_batch):
        return 0
    console.print(f"It does not fit. {_advice(fits, parallel, micro_batch, is_half)}")
    return 1


def _advice(fits: "Fits", parallel: "ParallelConfig", micro_batch: int, is_half: bool) -> str:
    """What would."""
    from train.plan.fits import stages

    found = []
    for recomputes in (False, True):
        for name, its in stages(replace(parallel, checkpoint_activations=recomputes)):
            if name == "zero 0" and is_half:  # it trains in float32 alone
                continue
            largest = fits.largest(its, most=micro_batch)
            if largest > 0:
                more = " and parallel.checkpoint_activations=true" if recomputes else ""
                found.append((-largest, recomputes, f"{name}, micro-batch {largest}{more}"))
    if not found:
        return "Nothing would on these: take more or larger GPUs, or a smaller model."
    return f"This would: {min(found)[2]}."


def _millions(config: "ModelConfig") -> str:
    from train.flops import num_parameters

    return f"{num_parameters(config) / 1e6:,.1f}"


if __name__ == "__main__":
    sys.exit(main())
