"""`python -m benchmarks memory`: what a training run takes, against what `stu-plan` says it will.

Each setting is a run of `stu-train`, three steps of two micro-batches in float32 on this machine's
CPU; the most resident memory of a rank, over what its process took before there was a model, is
compared with the plan's sum. glibc is told to give back what is freed: gaps of its heap are not the
run's.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decode_engine import tokenizer
from benchmarks.machine import describe
from stu.config import ModelConfig
from train.data.shards import TOKENIZER_FILE, Index, SplitWriter
from train.optimizer import OPTIMIZERS
from train.parallel.config import ParallelConfig
from train.plan.activations import activation_bytes
from train.plan.memory import rank_memory
from train.report import read_curves

STEPS, ACCUMULATED = 3, 2
SHAPE = ModelConfig(vocab_size=4096, width=512, num_layers=8, max_seq_len=2048, window_tokens=256)
ZERO = ParallelConfig(kind="zero")
SETTINGS = [
    # model, ranks, tokens, micro-batch, parallel
    (SHAPE, 1, 1024, 1, ParallelConfig()),
    (SHAPE, 1, 2048, 1, ParallelConfig()),
    (SHAPE, 1, 1024, 4, ParallelConfig()),
    (replace(SHAPE, layout="stu"), 1, 2048, 1, ParallelConfig()),
    (replace(SHAPE, mlp_ratio=12), 1, 1024, 1, ParallelConfig()),
    (SHAPE, 1, 2048, 2, ParallelConfig(checkpoint_activations=True)),
    (replace(SHAPE, mlp_ratio=12), 2, 1024, 1, ParallelConfig()),
    (replace(SHAPE, mlp_ratio=12), 2, 1024, 1, replace(ZERO, zero_stage=1)),
    (replace(SHAPE, mlp_ratio=12), 2, 1024, 1, replace(ZERO, zero_stage=2)),
    (replace(SHAPE, mlp_ratio=12), 2, 1024, 1, replace(ZERO, zero_stage=3)),
    (replace(SHAPE, mlp_ratio=12), 2, 1024, 1, ParallelConfig(kind="fsdp")),
]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """GiB of a rank, measured and planned, and how far apart they are."""
    result: dict[str, Any] = {"machine": describe(), "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data")
        for number, (config, ranks, seq_len, micro_batch, parallel) in enumerate(
            SETTINGS[: args.first]
        ):
            run_dir = Path(folder) / str(number)
            train(run_dir, data, config, ranks, seq_len, micro_batch, parallel, args.threads)
            measured = max(read_curves(run_dir)["train/memory_gib"][1])
            activations = activation_bytes(
                config, seq_len, micro_batch, parallel, is_half=False, on_gpu=False
            )
            memory = rank_memory(
                config,
                parallel,
                ranks,
                activations,
                is_half=False,
                on_gpu=False,
                state_bytes=OPTIMIZERS["adamw"].state_bytes,
            )
            planned = memory.total / 2**30
            run = {
                "layout": config.layout,
                "mlp_ratio": config.mlp_ratio,
                "ranks": ranks,
                "seq_len": seq_len,
                "micro_batch_size": micro_batch,
                "parallel": parallel.kind,
                "zero_stage": parallel.zero_stage if parallel.kind == "zero" else None,
                "checkpoint_activations": parallel.checkpoint_activations,
                "measured_gib": measured,
                "planned_gib": planned,
                "planned_over_measured": planned / measured,
            }
            print(run, file=sys.stderr, flush=True)
            result["runs"].append(run)
    return result


def train(
    run_dir: Path,
    data: Path,
    config: ModelConfig,
    ranks: int,
    seq_len: int,
    micro_batch: int,
    parallel: ParallelConfig,
    threads: int,
) -> None:
    """A short run."""
    values = {f"model.config.{name}": value for name, value in config.to_dict().items()}
    values |= {
        "data.dir": data,
        "data.seq_len": seq_len,
        "data.micro_batch_size": micro_batch,
        "trainer.accelerator": "cpu",
        "trainer.devices": ranks,
        "trainer.max_steps": STEPS,
        "model.optimizer.warmup_steps": 1,
        "trainer.accumulate_grad_batches": ACCUMULATED,
        "trainer.log_every_n_steps": 1,
        "trainer.limit_val_batches": 0,
        "trainer.num_sanity_val_steps": 0,
        "parallel.kind": parallel.kind,
        "parallel.zero_stage": parallel.zero_stage,
        "parallel.checkpoint_activations": str(parallel.checkpoint_activations).lower(),
        "run-dir": run_dir,
    }
    command = [sys.executable, "-m", "train.cli", *(f"--{k}={v}" for k, v in values.items())]
    # What is freed goes back at once: glibc would keep up to a third more, in gaps of its heap.
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = {**os.environ, **at_once, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)


def write_data(folder: Path) -> Path:
    """Token shards with random tokens."""
    import hashlib

    folder.mkdir()
    its = tokenizer()
    (folder / TOKENIZER_FILE).write_bytes(its.model_bytes)
    rng = np.random.default_rng(0)
    splits = {}
    for name in ("train", "validation"):
        with SplitWriter(folder, name, np.dtype(np.uint16), 10**6) as writer:
            for _ in itertools.repeat(None, 50):
                writer.add(rng.integers(300, its.vocab_size, 2000, dtype=np.uint16), 6000)
            splits[name] = writer.finish()
    Index(
        dtype="uint16",
        tokenizer_sha256=hashlib.sha256(its.model_bytes).hexdigest(),
        vocab_size=its.vocab_size,
        seed=0,
        validation_fraction=0.5,
        sources=["random"],
        num_skipped_files=0,
        num_empty_documents=0,
        splits=splits,
    ).save(folder)
    return folder
