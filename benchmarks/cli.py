"""`python -m benchmarks`: what is measured against peers. Each benchmark prints JSON."""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from stu.common.cli import run_command

BATCHES, NEW_TOKENS = [1, 8, 32, 64], [512, 2048, 8192, 32768]
CACHES = ["paged", "continuous", "epoched", "flashinference", "naive"]
PEERS = ["llama", "llama-dynamic", "mamba2", "rwkv", "s4"]
LAYOUTS = ["stu", "hybrid", "hyena"]
MIXERS = ["hybrid", "stu", "hyena", "attention"]
LEAST_NEW_TOKENS, LEAST_STEPS = 16, 20
"""Of what is timed in the middle of each fifth, and of what has a learning rate that warms up."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: the name of a benchmark, and its settings."""
    args = make_parser().parse_args(argv)
    return run_command("python -m benchmarks", lambda: print_result(args))


def print_result(args: argparse.Namespace) -> int:
    """Of a benchmark, as JSON."""
    # torch takes a second to import: after the command line is found valid.
    result = importlib.import_module(f"benchmarks.{args.benchmark}").measure(args)
    json.dump(result, sys.stdout, indent=1)
    print()
    return 0


def at_least(least: int) -> Callable[[str], int]:
    """Reads a whole number of a command line."""

    def parsed(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not allowed: give {least} or more")
        return int(text)

    return parsed


def new_file(text: str) -> Path:
    """Reads a file of a command line that is to be written, hours later."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.parent}: make it first")
    return path


def make_parser() -> argparse.ArgumentParser:
    """A command for each benchmark, which is a module of that name with a `measure`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, allow_abbrev=False
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    count = at_least(1)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return benchmarks.add_parser(
            name,
            help=text,
            description=text,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    convolution = add("convolution", "training and online convolutions against the usual ways")

    decode = add("decode", "steps of the engine with several caches, and of other models")
    decode.add_argument("--batch", type=count, nargs="+", default=BATCHES, help="requests together")
    decode.add_argument(
        "--new-tokens",
        type=at_least(LEAST_NEW_TOKENS),
        nargs="+",
        default=NEW_TOKENS,
        help="of each",
    )
    decode.add_argument("--prompt-tokens", type=count, default=512, help="of each")
    decode.add_argument("--width", type=count, default=1024, help="of the models")
    decode.add_argument("--layers", type=count, default=8, help="blocks of our models")
    decode.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="for all of them")
    decode.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of our model's weights"
    )
    decode.add_argument("--mlp-ratio", type=count, nargs="+", default=[4], help="of our model")
    decode.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["stu"], help="of ours")
    decode.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES, help="to compare")
    decode.add_argument(
        "--peers",
        nargs="+",
        choices=PEERS,
        default=[],
        help="other models of as many parameters; all but s4 need pip install 'stu[bench]'",
    )
    decode.add_argument("--rounds", type=count, default=3, help="of all caches and peers in turn")
    decode.add_argument("--page-len", type=count, default=32, help="positions in a page")
    decode.add_argument(
        "--whole", action="store_true", help="time every step of our caches, not a sample"
    )
    decode.add_argument(
        "--output", type=new_file, help="JSON file, written after each batch as well"
    )
    decode.add_argument("--plot", type=new_file, help="PNG file")

    model = add("model", "what decoding steps should take, by counted costs and measured rates")
    model.add_argument(
        "decode", metavar="FILE", type=Path, nargs="+", help="JSON of python -m benchmarks decode"
    )
    model.add_argument("--this-machine", action="store_true", help="say nothing of other machines")
    model.add_argument("--plot", type=new_file, help="PNG file")

    profile = add("profile", "what convolutions spend their time on while decoding")
    profile.add_argument("--batch", type=count, nargs="+", default=[1, 8], help="requests together")
    profile.add_argument("--new-tokens", type=at_least(LEAST_NEW_TOKENS), default=8192, help="each")
    profile.add_argument("--prompt-tokens", type=count, default=512, help="of each")
    profile.add_argument("--width", type=count, default=1024, help="of the model")
    profile.add_argument("--layers", type=count, default=8, help="of it")
    profile.add_argument("--page-len", type=count, default=32, help="positions in a page")
    profile.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES, help="of them")
    profile.set_defaults(device="cpu", dtype="float32", whole=False)

    invariance = add("invariance", "how often company changes a request's tokens, and the cure")
    invariance.add_argument("model", metavar="MODEL_DIR", type=Path, help="a trained model")
    invariance.add_argument(
        "data", metavar="DATA_DIR", type=Path, help="token shards, whose validation split is read"
    )
    invariance.add_argument("--prompts", type=count, default=100, help="pieces of it")
    invariance.add_argument("--prompt-tokens", type=count, default=64, help="of the longest one")
    invariance.add_argument("--new-tokens", type=count, default=128, help="of each prompt")
    invariance.add_argument("--batch", type=count, default=32, help="the larger company")

    soak = add("soak", "the engine's memory under random traffic")
    soak.add_argument("--seconds", type=float, default=3600, help="of traffic")
    soak.add_argument("--cache-gib", type=float, default=0.5, help="for pages")

    load = add(
        "load",
        "a server under many clients, and its engine alone; needs pip install 'stu[bench]'",
    )
    load.add_argument("--clients", type=count, default=64, help="in the closed loop")
    load.add_argument("--requests", type=count, default=256, help="of each loop")
    load.add_argument("--new-tokens", type=count, default=128, help="of each request")

    train = add("train", "training steps against two-branch convolutions and attention alone")
    train.add_argument("--context", type=count, nargs="+", default=[2048, 8192], help="tokens")
    train.add_argument("--width", type=count, default=512, help="of the models")
    train.add_argument("--layers", type=count, default=8, help="blocks")
    train.add_argument(
        "--window", type=count, default=1024, help="of the hybrid layout's attention"
    )
    train.add_argument("--repeats", type=count, default=3, help="steps of each way")
    train.add_argument("--plot", type=new_file, help="PNG file")

    quality = add("quality", "what each mixer learns from the same text")
    quality.add_argument("--folder", type=Path, default=Path("runs/quality"), help="of all runs")
    quality.add_argument("--layouts", nargs="+", choices=MIXERS, default=MIXERS, help="to compare")
    quality.add_argument("--seeds", type=count, default=3, help="of each layout's weights")
    quality.add_argument("--steps", type=at_least(LEAST_STEPS), default=400, help="of 2,048 tokens")
    quality.add_argument("--output", type=new_file, help="JSON file")
    quality.add_argument("--plot", type=new_file, help="PNG file")

    add("sizes", "what stu-plan says of models from 340 M to 13 B parameters")
    loss = add("loss", "the training loss against torch's, at a vocabulary of 200,064")
    loss.add_argument("--repeats", type=count, default=3, help="steps of each way")
    memory = add("memory", "what training runs take, against what stu-plan says")
    for its in (convolution, decode, invariance, load, train, loss):
        its.add_argument(
            "--threads", type=count, nargs="+", default=[1], help="torch threads, one after another"
        )
    for its in (soak, memory):
        its.add_argument("--threads", type=count, default=1, help="torch threads")
    for its in (convolution, loss, memory):
        its.add_argument("--first", type=count, help="so many of the runs; all, if it is not given")
    return parser


if __name__ == "__main__":
    sys.exit(main())
