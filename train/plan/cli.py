"""`stu-plan`: memory, speed and duration of a run, and what would fit instead, without a GPU."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from stu.common.cli import run_command
from stu.common.errors import UserError

DEFAULT_GPUS, DEFAULT_BATCH, DEFAULT_BITS = 8, 32, 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if the run fits, 1 if not, 2 for wrong settings and 3 for a fault
    of this program."""
    parser = argparse.ArgumentParser(
        prog="stu-plan",
        usage="stu-plan --gpu NAME --nodes N --gpus M --config FILE [--SETTING VALUE ...]\n"
        "       stu-plan --serve MODEL [--gpu NAME] [--gpus M] [--batch N] [--length N]\n"
        "                [--bits N]",
        description="Estimate the memory, speed and duration of a run of stu-train, given its "
        "settings, or with --serve, which GPUs a model fits on and how fast it decodes. The exit "
        "code is 1 if the run does not fit, and 2 if a setting is wrong.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--gpu",
        help="GPU model: a100-40g, a100-80g, h100-80g, h200-141g, l40s-48g, or `this` for this "
        "machine's; if that is another one, only the settings are checked. By default h100-80g, "
        "or with --serve all of them",
    )
    add("--nodes", type=_count, help="number of nodes, instead of trainer.num_nodes")
    gpus = "GPUs per node, instead of trainer.devices; 8 if neither is set"
    add("--gpus", type=_count, help=gpus)
    tokens = "tokens to train on, instead of trainer.max_steps steps"
    add("--tokens", type=_positive, help=tokens)
    serve = "plan decoding of this model: a model directory, or a YAML file of a model's settings"
    add("--serve", type=Path, metavar="MODEL", help=serve)
    add("--batch", type=_count, help="with --serve: sequences that decode together; by default 32")
    length = "with --serve: tokens per sequence, half of them new; by default, the model's longest"
    add("--length", type=_count, help=length)
    bits = "with --serve: bits per weight of the matrices, 32, 16 or 8; by default 16"
    add("--bits", type=int, choices=(32, 16, 8), help=bits)
    options, others = parser.parse_known_args(argv)
    return run_command("stu-plan", lambda: _plan(options, others), "train")


def _plan(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    return (
        _plan_run(options, arguments)
        if options.serve is None
        else _plan_serving(options, arguments)
    )


def _plan_serving(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from train.gpus import GPUS
    from train.plan.serving_report import show_serving

    _refuse(options, ("nodes", "tokens"), "with --serve")
    if arguments:
        raise UserError(message=f"{' '.join(arguments)} is not allowed with --serve: leave it out")
    names = list(GPUS) if options.gpu is None else [options.gpu]
    if names[0] not in GPUS:
        raise UserError("--gpu", options.gpu, f"one of {', '.join(GPUS)}")
    work = options.batch or DEFAULT_BATCH, options.length, options.bits or DEFAULT_BITS
    return show_serving(options.serve, names, options.gpus or DEFAULT_GPUS, *work)


def _plan_run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from train.config import num_devices, open_data  # modules that take seconds to import
    from train.gpus import GPUS
    from train.notes import data_warnings, describe_sources
    from train.plan.report import show_plan
    from train.settings import parse_settings

    _refuse(options, ("batch", "length", "bits"), "without --serve")
    options.gpu = options.gpu or "h100-80g"
    if options.gpu not in (*GPUS, "this"):
        raise UserError("--gpu", options.gpu, f"one of {', '.join(GPUS)}, or this")
    settings = parse_settings(arguments)
    nodes = options.nodes or settings.trainer.num_nodes
    gpus = options.gpus or num_devices(settings.trainer) or DEFAULT_GPUS
    data = open_data(settings)
    for text in data_warnings(data, settings, nodes * gpus) if data else []:
        print(f"warning: {text}", file=sys.stderr)
    code = show_plan(settings, options.gpu, nodes * gpus, nodes, options.tokens)
    if settings.lora.r:
        text = "memory and speed are those of training all weights"
        if code:
            text += "; with adapters alone, the run may fit"
        print(f"warning: {text}", file=sys.stderr)
        code = 0
    for text in describe_sources(data, settings, nodes * gpus) if data else []:
        print(text)
    return code


def _refuse(options: argparse.Namespace, names: Sequence[str], when: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise UserError(message=f"--{name} is not allowed {when}: leave it out")


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


if __name__ == "__main__":
    sys.exit(main())
