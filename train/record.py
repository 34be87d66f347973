"""The record of a run that its checkpoints carry: the settings that its results depend on."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from stu.config import ModelConfig
from stu.tokenizer import tokenizer_files
from train.checkpoint.folder import FORMAT_VERSION
from train.config import precision_name
from train.data.loader import TokenData
from train.optimizer import OptimizerConfig

MODEL, OPTIMIZER, DATA = "model.config.", "model.optimizer.", "data."
"""Prefixes of the names of settings."""
SAMPLES = "samples_per_step"


def result_settings(
    trainer: L.Trainer,
    data: TokenData,
    config: ModelConfig,
    optimizer: OptimizerConfig,
    z_loss: float,
    loss_jump: float,
) -> dict[str, Any]:
    """Return all settings that a run's results depend on, by name, except its length.

    The values are plain, so that they can be stored and compared.
    """
    ranks = trainer.num_devices * trainer.num_nodes // data.ranks_per_sample
    return {
        **{MODEL + name: value for name, value in config.to_dict().items()},
        **{OPTIMIZER + name: value for name, value in asdict(optimizer).items()},
        "model.z_loss": z_loss,
        "model.guard.loss_jump": loss_jump,
        "trainer.gradient_clip_val": trainer.gradient_clip_val or None,
        "trainer.gradient_clip_algorithm": str(trainer.gradient_clip_algorithm or "norm"),
        "trainer.precision": precision_name(trainer.precision),
        SAMPLES: ranks * trainer.accumulate_grad_batches * data.micro_batch_size,
        **{DATA + name: value for name, value in data.identity().items()},
    }


def training_record(
    settings: Mapping[str, Any], config: ModelConfig, tokenizer: Path
) -> dict[str, Any]:
    """Return what a checkpoint holds besides Lightning's state: tensors and plain values.

    tokenizer: Main file of the tokenizer.
    """
    return {
        "format_version": FORMAT_VERSION,
        "model_config": config.stored(),
        "settings": dict(settings),
        "tokenizer": {
            name: torch.frombuffer(bytearray(contents), dtype=torch.uint8)
            for name, contents in tokenizer_files(tokenizer).items()
        },
    }


def losses_since_log(
    saved: Mapping[str, Any], rank: int, num_ranks: int, micro_batches: int
) -> list[Tensor]:
    """Return the losses since the last logged step, for `rank` to continue with.

    Args:
        saved: Losses of all ranks, and micro-batches per step, in the checkpoint; may be empty.
        rank: Rank of this process.
        num_ranks: Number of ranks.
        micro_batches: Micro-batches per step.
    """
    if not saved or not saved["losses"].numel():
        return []
    losses = saved["losses"].view(-1, saved["losses"].shape[-1])  # [ranks, n]
    if (len(losses), saved["micro_batches"]) == (num_ranks, micro_batches):
        return list(losses[rank])
    # Every step weighs the same, whether it has few or many micro-batches.
    by_step = losses.mean(0).view(-1, saved["micro_batches"]).mean(1)
    return list(by_step.repeat_interleave(micro_batches))
