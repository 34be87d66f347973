"""Checkpoints of a training run: `RUN_DIR/checkpoints/step-N.ckpt` and `last.ckpt`."""

import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from stu.atomic import new_file

CHECKPOINT_KEY = "stu"
"""Under which a checkpoint holds what `stu-export` needs besides the weights."""


class DurableCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that are whole and on disk before they get their name.

    Loads with `weights_only`: a checkpoint holds tensors and plain values, and can run no code.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return load_checkpoint(Path(path))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU; ValueError if it is missing, damaged, or not one."""
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: no such file")
    if not zipfile.is_zipfile(path):  # the end of the file holds its table of contents
        raise ValueError(f"checkpoint {path}: cut short, or not a checkpoint of stu-train")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError) as error:
        first_line = str(error).split("\n", 1)[0]
        raise ValueError(f"checkpoint {path}: cannot be read ({first_line})") from error
    if not isinstance(contents, dict):
        raise ValueError(f"checkpoint {path}: not a checkpoint of stu-train")
    return contents


def last_checkpoint(run_dir: Path) -> Path:
    """The checkpoint that a run in `run_dir` goes on from."""
    path = run_dir / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise ValueError(f"{run_dir}: no checkpoints/last.ckpt; has a run been here?")
    return path


def periodic_checkpoints(run_dir: Path, every_steps: int, keep: int) -> ModelCheckpoint:
    """Saves `step-N.ckpt`, of which the last `keep` stay, and `last.ckpt`."""
    for name, value in (("checkpoint_every_steps", every_steps), ("keep_checkpoints", keep)):
        if value < 1:
            raise ValueError(f"{name}={value} is not allowed: it must be >= 1")
    return ModelCheckpoint(
        run_dir / "checkpoints",
        filename="step-{step:08d}",
        auto_insert_metric_name=False,
        monitor="step",
        mode="max",
        save_top_k=keep,
        save_last=True,
        every_n_train_steps=every_steps,
        enable_version_counter=False,
    )


def save_last(trainer: L.Trainer) -> None:
    """Save the final state as `last.ckpt`, whatever the interval is."""
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
