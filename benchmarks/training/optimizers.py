"""`python -m benchmarks optimizers`: what AdamW and Muon reach with the same tokens.

Runs of stu-train on the demo's corpus, the sources of Python's standard library, with a smaller
model and vocabulary than the demo's. One seed tries each learning rate; the best rate of each
optimizer is then repeated with the other seeds. Runs take turns, in this process.
"""

import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from jsonargparse.typing import PositiveInt

from benchmarks.machine import describe
from train import cli
from train.report import read_curves

VOCAB_SIZE = 1024
FIXED: dict[str, Any] = {
    "model.config.width": 96,
    "model.config.num_layers": 4,
    "model.config.num_heads": 4,
    "model.config.max_seq_len": 128,
    "model.config.window_tokens": 32,
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.log_every_n_steps": 10,
    "trainer.val_check_interval": 20,
    "trainer.limit_val_batches": 10,
    "trainer.num_sanity_val_steps": 0,
    "data.seq_len": 128,
    "data.micro_batch_size": 8,
    "model.optimizer.warmup_steps": 20,
    "model.optimizer.final_lr_fraction": 0.05,
}
TOKENS_PER_STEP = 8 * 128


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    steps: PositiveInt = 200
    """Optimizer steps of each run."""
    seeds: PositiveInt = 3
    """Number of seeds, of the initial weights and of the data's order."""
    rates: tuple[float, ...] = (2e-3, 6e-3)
    """Learning rates to try with the first seed, for example [2e-3]."""


def measure(options: Options) -> dict[str, Any]:
    """Return the runs, and of each optimizer's best rate the tokens to AdamW's final loss."""
    names, runs = ("adamw", "muon"), []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        command = [sys.executable, "-m", "train.data.cli", "stdlib:", "--output", str(data)]
        command += ["--vocab-size", str(VOCAB_SIZE), "--validation-fraction", "0.02"]
        subprocess.run(command, check=True, stdout=sys.stderr)

        def add(name: str, rate: float, seed: int) -> None:
            run_dir = Path(folder) / f"{name}-{rate}-{seed}"
            runs.append(run_once(name, rate, seed, options.steps, data, run_dir))
            shown = {key: value for key, value in runs[-1].items() if key != "validations"}
            print(shown, file=sys.stderr, flush=True)

        for rate in options.rates:
            for name in names:
                add(name, rate, 0)
        best = {name: min(of(runs, name), key=lambda run: run["bits_per_byte"]) for name in names}
        for seed in range(1, options.seeds):
            for name in names:
                add(name, best[name]["learning_rate"], seed)
    rates = {name: run["learning_rate"] for name, run in best.items()}
    chosen = {name: of(runs, name, rates[name]) for name in names}
    goal = fmean(run["bits_per_byte"] for run in chosen["adamw"])
    for run in chosen["adamw"] + chosen["muon"]:
        run["tokens_to_goal"] = tokens_to(goal, run["validations"])
    return {"machine": describe(), "goal": goal, "best_rates": rates, "runs": runs}


def run_once(
    name: str, rate: float, seed: int, steps: int, data: Path, run_dir: Path
) -> dict[str, Any]:
    """Train once, and return its figures."""
    settings = FIXED | {"data.dir": data, "data.seed": seed, "seed-everything": seed}
    settings |= {"model.optimizer.name": name, "model.optimizer.learning_rate": rate}
    settings |= {"trainer.max_steps": steps, "run-dir": run_dir}
    with redirect_stdout(sys.stderr):
        if code := cli.main([f"--{key}={value}" for key, value in settings.items()]):
            raise RuntimeError(f"{run_dir.name} ended with code {code}")
    curves = read_curves(run_dir)
    validations = list(zip(*curves["val/bits_per_byte"], strict=True))
    return {
        "optimizer": name,
        "learning_rate": rate,
        "seed": seed,
        "tokens": steps * TOKENS_PER_STEP,
        "bits_per_byte": validations[-1][1],
        "tokens_per_second": sorted(curves["train/tokens_per_second"][1])[-1],
        "validations": [(step * TOKENS_PER_STEP, value) for step, value in validations],
    }


def of(runs: list[dict[str, Any]], name: str, rate: float | None = None) -> list[dict[str, Any]]:
    """Return the runs of an optimizer, and of a learning rate if one is given."""
    return [
        run for run in runs if run["optimizer"] == name and rate in (None, run["learning_rate"])
    ]


def tokens_to(goal: float, validations: list[tuple[int, float]]) -> float | None:
    """Return the tokens after which a loss was reached, between validations by a straight line;
    None if it was not."""
    for (before, higher), (after, lower) in pairwise(validations):
        if lower <= goal:
            share = 1.0 if higher <= goal else (higher - goal) / (higher - lower)
            return before + share * (after - before)
    return None
