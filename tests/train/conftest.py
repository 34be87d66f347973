"""A small corpus as token shards, and the smallest model that trains on it."""

import random
from pathlib import Path

import pytest

from train.data.config import PrepareConfig
from train.data.prepare import prepare

WORDS = [
    "def",
    "return",
    "self",
    "value",
    "for",
    "import",
    "None",
    "x",
    "y",
    "(",
    ")",
    ":",
    "=",
    "1",
]

MODEL = {
    "vocab_size": 300,
    "width": 16,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
    "num_filters": 4,
    "max_seq_len": 32,
    "window_tokens": 8,
}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of token shards: 60 training samples or so of 16 tokens."""
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


@pytest.fixture
def settings(module_settings: list[str]) -> list[str]:
    """Arguments of `stu-train` but for the run's folder."""
    return module_settings


@pytest.fixture(scope="session")
def module_settings(data: Path) -> list[str]:
    """The same, for fixtures of a module."""
    values = {f"model.config.{name}": value for name, value in MODEL.items()}
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
