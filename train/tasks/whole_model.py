"""The model of a run, whole on every rank, for the engine."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import lightning as L
import torch
from torch import Tensor

from stu.model import FlashSTU
from train.checkpoint.sharded import ShardedSaving
from train.lora import LoraConfig, merged

Weights = dict[str, Tensor]
"""Tensors of a whole model by name."""


def room(trainer: L.Trainer, model: FlashSTU) -> Weights:
    """Return empty tensors for all weights and filters of the model of a run.

    On GPUs, those of a run in bfloat16 are bfloat16, except for the model's `wide_names`. That
    memory is lacking turns out here, where ranks are not waiting for one another.
    """
    device, wide = model.filters.device, model.wide_names
    is_half = device.type == "cuda" and str(trainer.precision).startswith("bf16")
    shapes = {name: buffer.shape for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        shapes[name] = getattr(parameter, "ds_shape", parameter.shape)  # of DeepSpeed's parts
    dtypes = {name: torch.bfloat16 for name in shapes.keys() - wide if is_half}
    return {
        name: torch.empty(shape, dtype=dtypes.get(name, torch.float32), device=device)
        for name, shape in shapes.items()
    }


@torch.no_grad()
def whole_model(trainer: L.Trainer, model: FlashSTU, held: Weights, lora: LoraConfig) -> FlashSTU:
    """Return a copy of the model of a run, with all its weights, in evaluation mode; collective.

    Args:
        trainer: Trainer of the run.
        model: Model that is trained.
        held: Result of `room`, which the copy takes.
        lora: Settings of the model's adapters, which are merged.
    """
    for name, tensor in chain(model.named_buffers(), _weights(trainer, model)):
        held[name].copy_(tensor)
    weights = merged(held, lora) if lora.r else held
    with torch.device("meta"):
        whole = FlashSTU(model.config)
    whole.load_state_dict(weights, assign=True)
    return whole.requires_grad_(False).eval()


def _weights(trainer: L.Trainer, model: FlashSTU) -> Iterator[tuple[str, Tensor]]:
    strategy: Any = trainer.strategy
    if isinstance(strategy, ShardedSaving):
        return strategy.whole_weights()
    return model.named_parameters()
