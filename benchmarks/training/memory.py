"""`python -m benchmarks memory`: the memory of training runs, against the plan of stu-plan.

Each setting is a run of stu-train on a CPU: three steps of two micro-batches in float32. The peak
of a rank's resident memory, beyond what its process took before it had a model, is compared with
the sum of the plan. glibc returns freed memory at once: gaps in its heap do not belong to the run.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse.typing import PositiveInt

from benchmarks.machine import describe
from stu.config import ModelConfig
from train.optimizer import OPTIMIZERS
from train.parallel.config import ParallelConfig
from train.plan.activations import RankStep, activation_bytes
from train.plan.memory import rank_memory
from train.report import read_curves

VOCAB_SIZE = 4096
HYBRID = ModelConfig(
    vocab_size=VOCAB_SIZE, width=512, num_layers=8, max_seq_len=2048, window_tokens=256
)
WIDE, ZERO = replace(HYBRID, mlp_ratio=12), ParallelConfig(kind="zero")
FIXED: dict[str, Any] = {
    "trainer.accelerator": "cpu",
    "trainer.max_steps": 3,
    "trainer.accumulate_grad_batches": 2,
    "trainer.log_every_n_steps": 1,
    "trainer.limit_val_batches": 0,
    "trainer.num_sanity_val_steps": 0,
    "model.optimizer.warmup_steps": 1,
}
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Setting(NamedTuple):
    """A model and how it is trained."""

    config: ModelConfig
    seq_len: int
    micro_batch: int
    ranks: int = 1
    parallel: ParallelConfig = ParallelConfig()


SETTINGS = [
    Setting(HYBRID, 1024, 1),
    Setting(HYBRID, 2048, 1),
    Setting(HYBRID, 1024, 4),
    Setting(replace(HYBRID, layout="stu"), 2048, 1),
    Setting(WIDE, 1024, 1),
    Setting(HYBRID, 2048, 2, 1, ParallelConfig(checkpoint_activations=True)),
    Setting(WIDE, 1024, 1, 2),
    Setting(WIDE, 1024, 1, 2, replace(ZERO, zero_stage=1)),
    Setting(WIDE, 1024, 1, 2, replace(ZERO, zero_stage=2)),
    Setting(WIDE, 1024, 1, 2, replace(ZERO, zero_stage=3)),
    Setting(WIDE, 1024, 1, 2, ParallelConfig(kind="fsdp")),
]


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    first: PositiveInt = 11
    """Number of runs."""


def measure(options: Options) -> dict[str, Any]:
    """Return the GiB of a rank, measured and planned, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(Path(folder) / "data")
        runs = []
        for number, setting in enumerate(SETTINGS[: options.first]):
            runs.append(compare(setting, data, Path(folder) / str(number)))
            print(runs[-1], file=sys.stderr, flush=True)
    return {"machine": describe(), "runs": runs}


def compare(setting: Setting, data: Path, run_dir: Path) -> dict[str, Any]:
    """Train in one setting, and return its figures."""
    config, seq_len, micro_batch, ranks, parallel = setting
    again = parallel.checkpoint_activations
    settings = FIXED | {"data.dir": data, "data.seq_len": seq_len, "trainer.devices": ranks}
    settings |= {"data.micro_batch_size": micro_batch, "parallel.kind": parallel.kind}
    settings["parallel.zero_stage"] = parallel.zero_stage
    settings["parallel.checkpoint_activations"] = str(again).lower()
    train(run_dir, config, settings)
    measured = max(read_curves(run_dir)["train/memory_gib"][1])
    device = {"is_half": False, "on_gpu": False}
    activations = activation_bytes(config, RankStep(seq_len, micro_batch, parallel, **device))
    state_bytes = OPTIMIZERS["adamw"].state_bytes(matrix_share=0)
    memory = rank_memory(config, parallel, ranks, activations, **device, state_bytes=state_bytes)
    planned = memory.total / 2**30
    zero_stage = parallel.zero_stage if parallel.kind == "zero" else None
    run = {"layout": config.layout, "mlp_ratio": config.mlp_ratio, "ranks": ranks}
    run |= {"seq_len": seq_len, "micro_batch_size": micro_batch, "parallel": parallel.kind}
    run |= {"zero_stage": zero_stage, "checkpoint_activations": again, "measured_gib": measured}
    return run | {"planned_gib": planned, "planned_over_measured": planned / measured}


def prepare(folder: Path) -> Path:
    """Tokenize Python's standard library into `folder`; return the folder."""
    command = [sys.executable, "-m", "train.data.cli", "stdlib:", "--output", str(folder)]
    command += ["--vocab-size", str(VOCAB_SIZE), "--validation-fraction", "0.02"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def train(run_dir: Path, config: ModelConfig, settings: dict[str, Any]) -> None:
    """Run stu-train with these settings."""
    values = {f"model.config.{name}": value for name, value in config.to_dict().items()}
    values |= settings | {"run-dir": run_dir}
    command = [sys.executable, "-m", "train.cli", *(f"--{k}={v}" for k, v in values.items())]
    environment = {**os.environ, **AT_ONCE, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{run_dir.name}: {done.stderr[-2000:]}")
