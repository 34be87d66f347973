"""The start of a run from its settings: the weights that it begins with, and adapters."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.model import FlashSTU
from train.checkpoint.folder import CHECKPOINTS, CheckpointFolder
from train.checkpoint.resume import say
from train.data.mixture import open_sources
from train.data.shards import TokenShards
from train.lora import LoraConfig, adapted_layers, add_adapters
from train.optimizer import OPTIMIZERS
from train.tuning.origin import Origin

ORIGIN, ADAPTERS = "init_from", "lora"
"""Keys in the record that checkpoints carry: path and hash of the model that a run started from,
and the settings of its adapters."""


def default_shape(settings: Any) -> Mapping[str, Any]:
    """Return the fields of the model's shape that `--init-from` gives by default, or the checkpoint
    that the run then continues from. Raises UserError."""
    if settings.init_from is None:
        return {}
    return _resumed_shape(settings) or Origin(settings.init_from).shape(_shards(settings))


def check_start(settings: Any, config: ModelConfig) -> None:
    """Raise UserError unless a new run of the shape `config` can start as its settings say."""
    lora, optimizer = _lora(settings), settings.model.optimizer.name
    if lora.r and OPTIMIZERS[optimizer].matrix_state_tensors is not None:
        allowed = "one that updates adapters too, as adamw does, with lora.r"
        raise UserError("model.optimizer.name", optimizer, allowed)
    if settings.init_from is None:
        if settings.init_tokens != "same":
            raise UserError("--init-tokens", settings.init_tokens, fix="it needs --init-from")
        if lora.r and _resumed_shape(settings) is None:
            fix = "it needs --init-from, as adapters change a model that is trained already"
            raise UserError("lora.r", lora.r, fix=fix)
    elif _resumed_shape(settings) is None:
        origin = Origin(settings.init_from)
        origin.check(config, _shards(settings), settings.init_tokens == "by-bytes")
        if lora.r:
            adapted_layers(origin.model, lora)


def begin(
    model: FlashSTU, checkpoint: Path | None, settings: Any, is_first: bool
) -> dict[str, Any]:
    """Give the model of a run its adapters, and that of a new run the weights that it starts from,
    and return what its record says of them.

    Args:
        model: Model of the run.
        checkpoint: The one that the run continues from; None for a new run.
        settings: Settings of the run, which have been checked.
        is_first: Whether this rank is the first, which reports the origin.

    Raises UserError.
    """
    lora = _lora(settings)
    adapters = {ADAPTERS: asdict(lora)} if lora.r else {}
    if checkpoint is None:
        record = _start(model, settings, is_first)
    else:
        record = CheckpointFolder(checkpoint).training["stu"]
        _check_same(checkpoint, record, settings, adapters)
    if lora.r:
        add_adapters(model, lora)
    return {ORIGIN: record[ORIGIN], **adapters} if ORIGIN in record else adapters


def _start(model: FlashSTU, settings: Any, is_first: bool) -> dict[str, Any]:
    """Load the weights that a new run starts from, if any, and return their record."""
    if settings.init_from is None:
        return {}
    origin, shards = Origin(settings.init_from), _shards(settings)
    assert shards is not None
    origin.copy_to(model, shards)
    if not is_first:
        return {}
    if origin.tokenizer is None:
        say(f"warning: {origin.path} has no tokenizer: that of the data is taken for its own")
    return {ORIGIN: origin.record()}


def _check_same(
    checkpoint: Path, record: Mapping[str, Any], settings: Any, adapters: Mapping[str, Any]
) -> None:
    """Raise UserError if the run of a checkpoint began otherwise than its settings say."""
    if ORIGIN not in record and settings.init_from is not None:
        message = f"--init-from {settings.init_from}: the run of {checkpoint} started from random "
        raise UserError("init_from", message=f"{message}weights: leave the option out")
    none = asdict(LoraConfig())
    before, now = record.get(ADAPTERS, none), adapters.get(ADAPTERS, none)
    if differing := [name for name in now if now[name] != before[name]]:
        listed = "; ".join(
            f"lora.{name}={now[name]!r}, but the checkpoint was trained with {before[name]!r}"
            for name in differing
        )
        raise UserError(f"lora.{differing[0]}", message=f"{listed}: resume with that")


def _lora(settings: Any) -> LoraConfig:
    """Return the settings of adapters. Raises UserError if one is not allowed."""
    group = settings.lora
    values = group.as_dict() if hasattr(group, "as_dict") else vars(group)
    return LoraConfig(**{n: value for n, value in values.items() if not n.startswith("__")})


def _resumed_shape(settings: Any) -> Mapping[str, Any] | None:
    """Return the shape in the checkpoint that a run would continue from; None for a new run.

    Nothing is verified yet: all checkpoints of a run have the same shape.
    """
    resume = settings.resume
    if resume is None:
        return None
    paths = sorted((settings.run_dir / CHECKPOINTS).glob("*.ckpt"), reverse=True)
    for path in paths if resume in ("auto", "last") else [Path(resume)]:
        try:
            shape: Mapping[str, Any] = CheckpointFolder(path).training["stu"]["model_config"]
        except UserError:
            continue  # it is named when the checkpoint is chosen
        return shape
    return None


def _shards(settings: Any) -> TokenShards | None:
    """Return shards of the run's tokenizer; None where a run is planned for another machine."""
    folder = Path(settings.data.dir)
    return open_sources(folder)[0].train if folder.exists() else None
