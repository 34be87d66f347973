"""The record of a run that its checkpoints carry: the settings that its results depend on."""

from collections.abc import Mapping
from dataclasses import asdict
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
    settings: Mapping[str, Any], config: ModelConfig, data: TokenData
) -> dict[str, Any]:
    """Return what a checkpoint holds besides Lightning's state: tensors and plain values."""
    template = data.chat_template
    return {
        "format_version": FORMAT_VERSION,
        "model_config": config.stored(),
        "settings": dict(settings),
        "tokenizer": {
            name: _bytes(contents)
            for name, contents in tokenizer_files(data.tokenizer_path).items()
        },
        **({} if template is None else {"chat_template": _bytes(template)}),
    }


def _bytes(contents: bytes) -> Tensor:
    """Return the contents of a file as a tensor."""
    return torch.frombuffer(bytearray(contents), dtype=torch.uint8)


class RecentLosses:
    """Losses of the micro-batches since the last logged step."""

    def __init__(self) -> None:
        self._means: list[Tensor] = []  # [2]: nats, and targets that count, per target

    def add(self, nats: Tensor, counted: Tensor | None) -> Tensor:
        """Add a micro-batch, and return `[2]`: nats and targets that count, both per target.

        Args:
            nats: Mean over all targets, of which those that do not count have none.
            counted: Whether each target counts; None if all do.
        """
        share = torch.ones_like(nats) if counted is None else counted.to(nats.dtype).mean()
        self._means.append(torch.stack([nats, share]))
        return self._means[-1]

    @property
    def last(self) -> float:
        """Nats per target that counts in the last micro-batch."""
        return nats_per_target(self._means[-1])

    def take(self, trainer: L.Trainer) -> float:
        """Return nats per target that counts, over all ranks, and forget them; collective."""
        means = torch.stack(self._means).mean(0)
        self._means.clear()
        if trainer.world_size > 1:
            means = trainer.strategy.reduce(means, reduce_op="mean")
        return nats_per_target(means)

    def to(self, device: torch.device) -> None:
        """Move them to a device."""
        self._means = [means.to(device) for means in self._means]

    def state(self, trainer: L.Trainer) -> dict[str, Any]:
        """Return the losses of all ranks, for a checkpoint; collective."""
        means = torch.zeros(0)
        if self._means:
            means = trainer.strategy.all_gather(torch.stack(self._means)).cpu()
        return {"means": means, "micro_batches": trainer.accumulate_grad_batches}

    def load(self, saved: Mapping[str, Any], trainer: L.Trainer) -> None:
        """Continue from the result of `state`, which may be empty, on this rank."""
        means = saved.get("means", torch.zeros(0))
        if "losses" in saved:  # of a version in which all targets counted
            means = torch.stack([saved["losses"], torch.ones_like(saved["losses"])], dim=-1)
        if not means.numel():
            return
        means = means.view(-1, *means.shape[-2:])  # [ranks, n, 2]
        micro_batches = trainer.accumulate_grad_batches
        if (len(means), saved["micro_batches"]) == (trainer.world_size, micro_batches):
            self._means = list(means[trainer.global_rank])
            return
        # Every step weighs the same, whether it has few or many micro-batches.
        by_step = means.mean(0).view(-1, saved["micro_batches"], 2).mean(1)
        self._means = list(by_step.repeat_interleave(micro_batches, dim=0))


def nats_per_target(means: Tensor) -> float:
    """Return the nats of each target that counts. means: result of `RecentLosses.add`."""
    return float(means[0] / means[1])
