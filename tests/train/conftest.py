"""A small corpus as token shards, the smallest model that trains on it, and runs of `stu-train`."""

import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train import cli
from train.data.config import PrepareConfig
from train.data.prepare import prepare

WORDS = ["def", "return", "self", "value", "for", "import", "None", *"xy():=1"]

MODEL = {"vocab_size": 300, "width": 16, "num_layers": 2, "num_heads": 2, "mlp_ratio": 2}
MODEL |= {"num_filters": 4, "max_seq_len": 32, "window_tokens": 8}


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def parallel(stage: int | str | None) -> dict[str, object]:
    """Return the settings of a ZeRO stage, of `fsdp`, or of neither."""
    if stage == "fsdp":
        return {"parallel.kind": "fsdp"}
    return {} if stage is None else {"parallel.kind": "zero", "parallel.zero_stage": stage}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of token shards: 166 training samples of 16 tokens."""
    source = random.Random(0)
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        text = "\n".join(" ".join(source.choices(WORDS, k=8)) for _ in range(4))
        (folder / f"{i:02d}.txt").write_text(text)
    shards = tmp_path_factory.mktemp("data") / "shards"
    prepare(
        PrepareConfig([str(folder)], shards, vocab_size=300, validation_fraction=0.2, workers=1)
    )
    return shards


@pytest.fixture(scope="session", name="settings")
def train_settings(data: Path) -> list[str]:
    """Arguments of `stu-train`, except for the folder and the length of the run."""
    values = {f"model.config.{name}": value for name, value in MODEL.items()}
    del values["model.config.vocab_size"]  # the token shards have it
    values |= {
        "data.dir": data,
        "data.seq_len": 16,
        "data.micro_batch_size": 2,
        "model.optimizer.warmup_steps": 1,
        "model.optimizer.learning_rate": 1e-2,
        "trainer.accelerator": "cpu",
        "trainer.log_every_n_steps": 1,
        "trainer.val_check_interval": 5,
    }
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="session")
def train(settings: list[str]) -> Callable[..., Path]:
    """Function that runs `stu-train` in a folder, checks its exit code and returns the folder."""

    def run(folder: Path, *arguments: object, code: int = 0) -> Path:
        environment, num_threads = dict(os.environ), torch.get_num_threads()
        try:
            ended = cli.main([*settings, f"--run-dir={folder}", *map(str, arguments)])
        except SystemExit as stop:  # how a parser stops, and a run that received a signal
            ended = stop.code
        finally:  # ranks that a later test starts would inherit the port of this one
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            os.environ.clear()
            os.environ.update(environment)
            torch.set_num_threads(num_threads)
        assert ended == code
        return folder

    return run


@pytest.fixture(scope="session")
def trained(train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, for tests that only read it."""
    return train(
        tmp_path_factory.mktemp("trained") / "run",
        "--trainer.max_steps=12",
        "--checkpoint-every-steps=5",
        "--keep-checkpoints=1",
        "--model.optimizer.warmup_steps=2",
    )


@pytest.fixture
def ordered_event_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the event files of a run sort in the order of their jobs.

    TensorBoard orders them by the second in their names, and these runs take less.
    """
    clock = itertools.count(time.time() + 3600)
    monkeypatch.setattr(
        "tensorboard.summary.writer.event_file_writer.time",
        SimpleNamespace(time=lambda: next(clock)),
    )
