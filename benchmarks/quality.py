"""`python -m benchmarks quality`: what each mixer learns from the same text, with as many weights.

    python -m benchmarks quality --output quality.json --plot quality.png

Flash-STU's hybrid, STU, Hyena and attention, of one depth and of the width that makes the number of
weights the same, are trained by `stu-train` on the standard library's own sources: the same samples
in the same order, from several seeds of the weights. Each layout's learning rate is the best of
short runs at rates a factor of two apart, with a worse one on either side. As many runs go on at a
time as the machine has cores, each of one thread. Those that are in the folder already, of the same
commit, are not made again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import describe
from stu.config import ModelConfig
from train.flops import num_parameters
from train.report import gzip_bits_per_byte, read_curves, unigram_bits_per_byte

VOCAB_SIZE, NUM_LAYERS, NUM_HEADS = 4096, 4, 4
WEIGHTS = 5_250_000
SEQ_LEN, MICRO_BATCH, WARMUP_STEPS, EVALUATIONS = 512, 4, 50, 10
VALIDATION_TOKENS = 32_768
FIRST_RATES = [2e-3, 4e-3]
COMMIT_DIGITS = 40
SWEEP_SHARE = 0.25
"""Of the steps, in the short runs."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Bits per byte by step and by seconds, of each layout and seed; means and ranges."""
    machine = describe()
    folder: Path = args.folder / machine["commit"]
    if folder.exists() and len(machine["commit"]) != COMMIT_DIGITS:
        raise ValueError(
            f"{folder}: runs of files that no commit names cannot be told from others: commit the "
            "files, or delete the folder"
        )
    data = folder / "data"
    if not data.exists():
        prepare = [_program("stu-prepare"), "stdlib:", "--output", data]
        subprocess.run([*prepare, "--validation-fraction", "0.02"], check=True, stdout=sys.stderr)
    shapes = {layout: shape(layout) for layout in args.layouts}
    short = int(SWEEP_SHARE * args.steps)

    def sweep(layout: str) -> list[Run]:
        return swept(lambda rate: Run(folder, data, shapes[layout], rate, 0, short, evaluations=1))

    sweeps = in_parallel(sweep, args.layouts, "sweeps")
    runs = [
        Run(folder, data, shapes[layout], its[0].rate, seed, args.steps, EVALUATIONS)
        for seed in range(args.seeds)
        for layout, its in zip(args.layouts, sweeps, strict=True)
    ]
    in_parallel(Run.train, runs, "runs")
    result = {
        "machine": machine,
        "tokens": args.steps * MICRO_BATCH * SEQ_LEN,
        "seq_len": SEQ_LEN,
        "unigram_bits_per_byte": unigram_bits_per_byte(data),
        "gzip_bits_per_byte": gzip_bits_per_byte(data),
        "sweep": [run.summary() for its in sweeps for run in its],
        "layouts": {
            layout: summary(shapes[layout], [run for run in runs if run.layout == layout])
            for layout in args.layouts
        },
    }
    result["reached"] = time_to_reach(result["layouts"])
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        from benchmarks.quality_plot import plot

        plot(result, args.plot)
    return result


def shape(layout: Any) -> ModelConfig:
    """Of the width, a multiple of the heads, at which it has about `WEIGHTS`."""

    def of_width(width: int) -> ModelConfig:
        return ModelConfig(
            vocab_size=VOCAB_SIZE,
            width=width,
            num_layers=NUM_LAYERS,
            layout=layout,
            num_heads=NUM_HEADS,
            max_seq_len=SEQ_LEN,
            window_tokens=SEQ_LEN,
        )

    widths = range(16 * NUM_HEADS, 128 * NUM_HEADS, NUM_HEADS)
    return min(map(of_width, widths), key=lambda its: abs(num_parameters(its) - WEIGHTS))


class Run:
    """One training run, in a folder of its own; one that is there already is not made again."""

    def __init__(
        self,
        folder: Path,
        data: Path,
        config: ModelConfig,
        rate: float,
        seed: int,
        steps: int,
        evaluations: int,
    ) -> None:
        self.layout, self.rate, self.seed, self.steps = config.layout, rate, seed, steps
        self._config, self._data, self._every = config, data, max(1, steps // evaluations)
        self._folder = folder / f"{config.layout}-{rate:g}-{seed}-{steps}"

    def train(self) -> None:
        """Unless it was."""
        values = {f"model.config.{name}": its for name, its in self._config.to_dict().items()}
        values |= {
            "data.dir": self._data,
            "data.seq_len": SEQ_LEN,
            "data.micro_batch_size": MICRO_BATCH,
            "data.max_validation_tokens": VALIDATION_TOKENS,
            "model.optimizer.learning_rate": self.rate,
            "model.optimizer.warmup_steps": min(WARMUP_STEPS, self.steps // 5),
            "model.optimizer.final_lr_fraction": 0.05,
            "trainer.accelerator": "cpu",
            "trainer.max_steps": self.steps,
            "trainer.val_check_interval": self._every,
            "trainer.log_every_n_steps": self._every,
            "checkpoint-every-steps": self.steps,
            "seed-everything": self.seed,
            "run-dir": self._folder,
            "resume": "auto",
        }
        command = [_program("stu-train"), *(f"--{name}={its}" for name, its in values.items())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self._folder.name}: {done.stderr[-2000:]}")
        tqdm.write(f"{self._folder.name}: {self.bits_per_byte():.3f} bits/byte", file=sys.stderr)

    def bits_per_byte(self) -> float:
        """At the end."""
        return self._curves()["val/bits_per_byte"][1][-1]

    def summary(self) -> dict[str, Any]:
        """Its settings, and bits per byte by step and by seconds of training."""
        curves = self._curves()
        steps, bits = curves["val/bits_per_byte"]
        speeds = dict(zip(*curves["train/tokens_per_second"], strict=True))
        seconds, total, last = [], 0.0, 0
        for step in steps:
            total += (step - last) * MICRO_BATCH * SEQ_LEN / speeds[step]
            last = step
            seconds.append(total)
        return {
            "layout": self.layout,
            "learning_rate": self.rate,
            "seed": self.seed,
            "steps": steps,
            "seconds": seconds,
            "bits_per_byte": bits,
        }

    def _curves(self) -> dict[str, tuple[list[int], list[float]]]:
        return read_curves(self._folder)


def swept(make: Callable[[float], Run]) -> list[Run]:
    """Trained, the best first: more rates until the best is neither the lowest nor the highest."""
    runs = [make(rate) for rate in FIRST_RATES]
    for run in runs:
        run.train()
    while True:
        best, rates = min(runs, key=Run.bits_per_byte), [run.rate for run in runs]
        if min(rates) < best.rate < max(rates):
            return sorted(runs, key=Run.bits_per_byte)
        runs.append(make(best.rate / 2 if best.rate == min(rates) else best.rate * 2))
        runs[-1].train()


def in_parallel(call: Callable[[Any], Any], items: Collection[Any], unit: str) -> list[Any]:
    """What it returns of each, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(call, items)
        return list(tqdm(done, total=len(items), unit=f" {unit}", smoothing=0))


def summary(config: ModelConfig, runs: list[Run]) -> dict[str, Any]:
    """Of a layout: mean and range over the seeds."""
    summaries = [run.summary() for run in runs]
    last = [its["bits_per_byte"][-1] for its in summaries]
    seconds = [its["seconds"][-1] for its in summaries]
    return {
        "width": config.width,
        "parameters": num_parameters(config),
        "learning_rate": runs[0].rate,
        "mean_bits_per_byte": statistics.mean(last),
        "lowest_bits_per_byte": min(last),
        "highest_bits_per_byte": max(last),
        "mean_seconds": statistics.mean(seconds),
        "runs": summaries,
    }


def time_to_reach(layouts: dict[str, Any]) -> dict[str, Any]:
    """Seconds of training until a run was as good as the worst of all is at its end: mean and range
    over the seeds."""
    runs = [run for its in layouts.values() for run in its["runs"]]
    bits = max(run["bits_per_byte"][-1] for run in runs)
    reached = {}
    for layout, its in layouts.items():
        times = [_first_time(run["seconds"], run["bits_per_byte"], bits) for run in its["runs"]]
        reached[layout] = {
            "mean_seconds": statistics.mean(times),
            "lowest_seconds": min(times),
            "highest_seconds": max(times),
        }
    return {"bits_per_byte": bits, "layouts": reached}


def _first_time(seconds: list[float], bits: list[float], wanted: float) -> float:
    """Between two evaluations on a straight line; before the first, that one's."""
    i = next(i for i, value in enumerate(bits) if value <= wanted)
    if i == 0:
        return seconds[0]
    share = (bits[i - 1] - wanted) / (bits[i - 1] - bits[i])
    return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])


def _program(name: str) -> Path:
    return Path(sys.executable).with_name(name)
