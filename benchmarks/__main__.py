"""Run a benchmark and print its result as JSON.

    python -m benchmarks NAME [OPTIONS] > benchmarks/results/NAME.json
    python -m benchmarks.tables

The second command writes the results into the tables and pictures of README.md and docs/.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import fields

from jsonargparse.typing import PositiveInt

from stu.common.cli import ArgumentParser, run_command

BENCHMARKS = {
    "decode": ("decoding.decode", "decoding steps with several caches, and of other models"),
    "peers": ("decoding.programs", "our engine and server against llama.cpp and vLLM"),
    "model": ("decoding.model", "a cost model of decoding, compared with results of decode"),
    "online": ("decoding.online", "one long convolution, by direct sums, FutureFill and states"),
    "realisation": ("decoding.realisation", "states of filters: rank, error, seconds and memory"),
    "kernels": ("kernels", "registers and spills of the decoding kernels, without a GPU"),
    "convolution": ("training.convolution", "the training convolution against two branches"),
    "train": ("training.train", "training steps against two branches and attention"),
    "loss": ("training.loss", "the training loss against torch's, for a large vocabulary"),
    "memory": ("training.memory", "memory of training runs against the plan of stu-plan"),
    "quality": ("training.quality", "what mixers and optimizers learn from the same tokens"),
    "documents": ("training.documents", "documents kept apart in training against together"),
    "tokenizers": ("training.tokenizers", "encoding by each kind of tokenizer and its library"),
    "load": ("serving.load", "a server under many clients, and its engine alone"),
    "step": ("serving.step", "what the engine's steps spend beside the model's forward pass"),
    "prefixes": (
        "serving.prefixes",
        "remembered prefixes, and long prompts beside running requests",
    ),
    "speculation": ("serving.speculation", "decoding with guessed tokens against without"),
    "invariance": ("serving.invariance", "how often batch composition changes a request's tokens"),
}
"""Module and description of each benchmark. The module has the dataclass `Options` and
`measure(options)`, which returns the result."""
HELP = "\n".join(f"  {name:12} {text}" for name, (_, text) in BENCHMARKS.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments else "--help"
    if name in ("-h", "--help"):
        print(f"usage: python -m benchmarks NAME [OPTIONS]\n\n{HELP}")
        return 0
    if name not in BENCHMARKS:
        print(f"python -m benchmarks: error: no benchmark {name}:\n{HELP}", file=sys.stderr)
        return 2
    return run_command(f"python -m benchmarks {name}", lambda: print_result(name, arguments))


def print_result(name: str, arguments: Sequence[str]) -> int:
    """Run a benchmark and print its result."""
    import torch  # which takes seconds

    module_name, description = BENCHMARKS[name]
    module = importlib.import_module(f"benchmarks.{module_name}")
    parser = ArgumentParser(prog=f"python -m benchmarks {name}", description=description)
    parser.add_settings(module.Options)
    parser.add_argument("--threads", type=PositiveInt, default=1, help="Number of torch's threads.")
    settings = parser.parse_args(list(arguments))
    names = [field.name for field in fields(module.Options)]
    torch.set_num_threads(settings.threads)
    result = module.measure(module.Options(**{name: getattr(settings, name) for name in names}))
    json.dump(result, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
