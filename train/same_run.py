"""The comparison of a resumed run with its checkpoint: nothing that changes results may differ."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from stu.common.errors import UserError
from train.checkpoint.folder import WEIGHT, CheckpointFolder
from train.checkpoint.resume import say
from train.data.loader import BEFORE_DOCUMENTS, TokenData
from train.module import FlashSTUModule
from train.record import DATA, MODEL, OPTIMIZER, SAMPLES
from train.start.provenance import changes_since

SCHEDULE = ("trainer.max_steps", "trainer.max_time")
"""Settings of a run's length, which also change its schedule: a change only gets a warning."""
OPTIMIZER_NAME = f"{OPTIMIZER}name"


def compare(
    checkpoint: Path | None,
    trainer: L.Trainer,
    module: FlashSTUModule,
    data: TokenData,
    allowed: Collection[str],
    schedule: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Compare a run with the checkpoint that it continues from, and prepare module and data for the
    allowed changes. Returns all changes since the run began.

    Raises UserError, naming every setting that changed and is not `allowed`.
    """
    settings = module.result_settings(trainer, data)
    if checkpoint is None:
        check_same({}, settings, allowed)
        return []
    folder = CheckpointFolder(checkpoint)
    saved = folder.training
    changed = check_same(saved_settings(saved), settings, allowed)
    if any(name.startswith(MODEL) for name in changed):
        check_shapes(folder, module)
    data.accepted_changes = {name.removeprefix(DATA) for name in changed if name.startswith(DATA)}
    data.load_state_dict(saved[type(data).__qualname__])
    warn_of_differences(saved, schedule, provenance)
    changes = list(saved["stu"].get("changes", []))
    for name, (before, now) in changed.items():
        changes.append({"step": saved["global_step"], "name": name, "before": before, "now": now})
    return changes


def saved_settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with which a checkpoint was written; old checkpoints lack some."""
    record = checkpoint["stu"]
    if "settings" in record:
        rows = {DATA + name: value for name, value in BEFORE_DOCUMENTS.items()}
        return {OPTIMIZER_NAME: "adamw", **rows, **record["settings"]}
    data = {name: value for name, value in checkpoint["TokenData"].items() if name != "position"}
    groups = ((MODEL, record["model_config"]), (OPTIMIZER, record["optimizer"]), (DATA, data))
    return {prefix + name: value for prefix, values in groups for name, value in values.items()}


def check_same(
    saved: Mapping[str, Any], settings: Mapping[str, Any], allowed: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """Return the changes that `allowed` names, with the values before and after.

    Raises UserError, naming every other setting that changed and both its values.
    """
    if unknown := sorted(set(allowed) - settings.keys()):
        raise UserError("--allow-change", ",".join(unknown), f"names of {', '.join(settings)}")
    changed = {
        name: (saved[name], value)
        for name, value in settings.items()
        if name in saved and saved[name] != value
    }
    if OPTIMIZER_NAME in changed:
        before, now = changed[OPTIMIZER_NAME]
        raise UserError(
            OPTIMIZER_NAME, now, repr(before), "the checkpoint has that optimizer's state alone"
        )
    refused = {name: values for name, values in changed.items() if name not in allowed}
    if refused:
        listed = "; ".join(
            f"{name}{_is(name)}{now!r}, but the checkpoint was trained with {before!r}"
            for name, (before, now) in refused.items()
        )
        raise UserError(
            next(iter(refused)),
            message=f"{listed}: resume with that, start a new run, or accept the change with "
            f"--allow-change {','.join(refused)}",
        )
    return changed


def check_shapes(folder: CheckpointFolder, module: FlashSTUModule) -> None:
    """Raise UserError unless the weights of a checkpoint fit into the model."""
    for name, tensor in module.model.state_dict().items():
        saved = list(folder.tensor(WEIGHT, name).shape)
        if saved != list(tensor.shape):
            raise UserError(
                message=f"{name} is of shape {list(tensor.shape)}, and {saved} in checkpoint "
                f"{folder.path}: these changes of {MODEL}* make another model"
            )


@rank_zero_only
def warn_of_differences(
    checkpoint: Mapping[str, Any], schedule: Mapping[str, Any], provenance: Mapping[str, Any]
) -> None:
    """Print warnings about differences that a resumed run may have, but that affect results."""
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


def _is(name: str) -> str:
    return " is " if name.startswith(DATA) or name == SAMPLES else "="
