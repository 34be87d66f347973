"""Training checkpoints on disk: when they are written, how, and what stu adds to Lightning's."""

import dataclasses
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from stu.atomic import new_file
from stu.config import ModelConfig
from train.optimizer import OptimizerConfig

FORMAT_VERSION = 1
CHECKPOINTS = "checkpoints"
"""Folder of a run in which its checkpoints lie."""
LAST = "last.ckpt"


class Checkpoints(Checkpoint):
    """Writes `step-00000500.ckpt` and so on, and points the link `last.ckpt` at the newest.

    A checkpoint is due every `every_steps` optimizer steps and when training stops. The newest
    `keep` stay. `last.ckpt` names a whole checkpoint at any moment from the first one on.
    """

    def __init__(self, folder: Path, every_steps: int, keep: int) -> None:
        for name, value in (("checkpoint_every_steps", every_steps), ("keep_checkpoints", keep)):
            if value < 1:
                raise ValueError(f"{name}={value} is not allowed: it must be at least 1")
        self._folder, self._every_steps, self._keep = folder, every_steps, keep
        self._stop_wanted = False

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # A checkpoint holds no gradients: between two optimizer steps, neither save nor stop.
        self._stop_wanted |= trainer.should_stop
        step_done = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # Lightning validates before it stops early, but not before it stops at max_steps.
        last_step = trainer.global_step == trainer.max_steps
        trainer.should_stop = step_done and (self._stop_wanted or last_step)
        due = trainer.global_step % self._every_steps == 0
        if trainer.should_stop or (step_done and due):
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        path = self._folder / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            link = self._folder / f".{LAST}.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            link.replace(self._folder / LAST)
            by_age = sorted(self._folder.glob("step-*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
            for old in by_age[: -self._keep]:
                old.unlink()


class DurableCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that are on disk as a whole before they get their name.

    Lightning's own goes through a copy in memory and a file in the system's temporary folder, which
    may lie on another disk: then its last step is a plain copy.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:  # how torch reports a failed write
                raise OSError(f"checkpoint {path}: could not be written ({error})") from error


def last_checkpoint(run_dir: Path) -> Path:
    """The checkpoint that a run in `run_dir` goes on from."""
    path = run_dir / CHECKPOINTS / LAST
    if not path.is_file():
        raise ValueError(f"{run_dir}: no {CHECKPOINTS}/{LAST}; has a run been here?")
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint file, memory-mapped. No code in it is run.

    Raises ValueError if it is missing, damaged, or not written by stu-train.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: no such file")
    if not zipfile.is_zipfile(path):  # the list of contents stands at the end of the file
        raise ValueError(f"checkpoint {path}: cut short, or not a checkpoint of stu-train")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load documents none, and raises many kinds
        kind = type(error).__name__
        raise ValueError(
            f"checkpoint {path}: damaged, or not written by stu-train ({kind})"
        ) from error
    if not isinstance(contents, dict) or "stu" not in contents:
        raise ValueError(f"checkpoint {path}: not written by stu-train")
    version = contents["stu"].get("format_version", 0)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"checkpoint {path}: format version {version}, and this stu reads {FORMAT_VERSION}: "
            f"install {'a newer' if version > FORMAT_VERSION else 'an older'} stu"
        )
    return contents


def training_record(
    config: ModelConfig, optimizer: OptimizerConfig, max_steps: int, tokenizer: Path
) -> dict[str, Any]:
    """What stu adds to a checkpoint: only tensors and plain values, to be read without pickle."""
    return {
        "format_version": FORMAT_VERSION,
        "model_config": config.to_dict(),
        "optimizer": dataclasses.asdict(optimizer),
        "max_steps": max_steps,
        "tokenizer": torch.frombuffer(bytearray(tokenizer.read_bytes()), dtype=torch.uint8),
    }


def check_settings(
    checkpoint: Mapping[str, Any], config: ModelConfig, optimizer: OptimizerConfig, max_steps: int
) -> None:
    """Raise ValueError unless a run with these settings goes on where `checkpoint` stopped.

    Another `max_steps` only gets a warning: it bends the schedule, but is how a run is prolonged.
    """
    record = checkpoint["stu"]
    for group, given, used in (
        ("config", config.to_dict(), record["model_config"]),
        ("optimizer", dataclasses.asdict(optimizer), record["optimizer"]),
    ):
        for name, value in given.items():
            if value != used[name]:
                raise ValueError(
                    f"model.{group}.{name}={value!r}, but the checkpoint was trained with "
                    f"{used[name]!r}: resume with that, or start a new run"
                )
    if record["max_steps"] != max_steps:
        rank_zero_warn(
            f"trainer.max_steps={max_steps}, but the checkpoint was trained with "
            f"{record['max_steps']}: from here on, the learning rate follows another schedule"
        )
