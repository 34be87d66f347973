"""A resumed run is the one that was interrupted: all that changes its result is compared."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only

from train.checkpoint.callback import say
from train.checkpoint.folder import FORMAT_VERSION, WEIGHT, CheckpointFolder
from train.config import precision_name
from train.data.loader import TokenData
from train.start.provenance import changes_since

if TYPE_CHECKING:
    from train.module import FlashSTUModule

SCHEDULE = ("trainer.max_steps", "trainer.max_time")
"""They bend the schedule, and are how a run is prolonged: another value gets a warning."""
MODEL, OPTIMIZER, DATA = "model.config.", "model.optimizer.", "data."
SAMPLES = "samples_per_step"


def result_settings(
    trainer: L.Trainer, module: "FlashSTUModule", data: TokenData
) -> dict[str, Any]:
    """Return by name all that changes what a run computes, but for its length: plain values."""
    ranks = trainer.num_devices * trainer.num_nodes
    return {
        **_with_prefix(MODEL, module.config.to_dict()),
        **_with_prefix(OPTIMIZER, dataclasses.asdict(module.optimizer_config)),
        "model.z_loss": module.z_loss,
        "model.guard.loss_jump": module.guard_config.loss_jump,
        "trainer.gradient_clip_val": trainer.gradient_clip_val or None,
        "trainer.gradient_clip_algorithm": str(trainer.gradient_clip_algorithm or "norm"),
        "trainer.precision": precision_name(trainer.precision),
        SAMPLES: ranks * trainer.accumulate_grad_batches * data.micro_batch_size,
        **_with_prefix(DATA, data.identity()),
    }


def training_record(settings: Mapping[str, Any], tokenizer: Path) -> dict[str, Any]:
    """Return what stu adds to a checkpoint: only tensors and plain values, read without pickle."""
    return {
        "format_version": FORMAT_VERSION,
        "model_config": _without_prefix(MODEL, settings),
        "settings": dict(settings),
        "tokenizer": torch.frombuffer(bytearray(tokenizer.read_bytes()), dtype=torch.uint8),
    }


def saved_settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `result_settings` were when a checkpoint was written; not all in old ones."""
    record = checkpoint["stu"]
    if "settings" in record:
        settings: dict[str, Any] = record["settings"]
        return settings
    data = {name: value for name, value in checkpoint["TokenData"].items() if name != "position"}
    return {
        **_with_prefix(MODEL, record["model_config"]),
        **_with_prefix(OPTIMIZER, record["optimizer"]),
        **_with_prefix(DATA, data),
    }


def check_same(
    saved: Mapping[str, Any], given: Mapping[str, Any], allowed: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """Return the changes that `allowed` names, with the values before and after.

    Raises ValueError, naming every other setting that changed and both its values.
    """
    if unknown := sorted(set(allowed) - given.keys()):
        raise ValueError(
            f"allow_change={','.join(unknown)} is not known: it can name {', '.join(given)}"
        )
    changed = {name: (saved[name], given[name]) for name in given if _differ(name, saved, given)}
    refused = {name: values for name, values in changed.items() if name not in allowed}
    if refused:
        listed = "; ".join(
            f"{name}{_is(name)}{now!r}, but the checkpoint was trained with {before!r}"
            for name, (before, now) in refused.items()
        )
        raise ValueError(
            f"{listed}: resume with that, start a new run, or say yes to the change with "
            f"--allow-change {','.join(refused)}"
        )
    return changed


def check_shapes(folder: CheckpointFolder, module: "FlashSTUModule") -> None:
    """Raise ValueError unless the weights of a checkpoint fit into the model."""
    for name, tensor in module.model.state_dict().items():
        saved = list(folder.tensor(WEIGHT, name).shape)
        if saved != list(tensor.shape):
            raise ValueError(
                f"{name} is of shape {list(tensor.shape)}, and {saved} in checkpoint "
                f"{folder.path}: these changes of {MODEL}* make another model"
            )


@rank_zero_only
def warn_of_differences(
    checkpoint: Mapping[str, Any], schedule: Mapping[str, Any], provenance: Mapping[str, Any]
) -> None:
    """Warn of what a run may change when it is resumed, and should know."""
    record = checkpoint["stu"]
    before = record.get("schedule", {"trainer.max_steps": str(record.get("max_steps"))})
    for name in SCHEDULE:
        if name in before and before[name] != schedule[name]:
            say(
                f"warning: {name}={schedule[name]}, but the checkpoint was trained with "
                f"{before[name]}: from here on, the learning rate follows another schedule"
            )
    if "provenance" in record:
        changes = changes_since(record["provenance"], provenance)
        if changes:
            say(
                f"warning: the checkpoint was written by other code: {'; '.join(changes)}. "
                "Results may differ from here on"
            )


def _differ(name: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    return name in saved and bool(saved[name] != given[name])


def _is(name: str) -> str:
    return " is " if name.startswith(DATA) or name == SAMPLES else "="


def _with_prefix(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {prefix + name: value for name, value in values.items()}


def _without_prefix(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    names: Iterable[str] = (name for name in values if name.startswith(prefix))
    return {name.removeprefix(prefix): values[name] for name in names}
