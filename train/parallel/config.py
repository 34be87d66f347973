"""How the ranks of a run share a model: settings, and Lightning's strategy for them."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch.utils.checkpoint import checkpoint

from stu.model import FlashSTU

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from train.checkpoint.writer import CheckpointWriter


@dataclass(frozen=True)
class ParallelConfig:
    """What each rank holds, and what it computes again to hold less."""

    kind: Literal["ddp", "zero", "fsdp"] = "ddp"
    """`ddp`: every rank holds all. `zero`: DeepSpeed, see `zero_stage`. `fsdp`: PyTorch's FSDP2,
    which divides all that ZeRO's stage 3 does."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed divides among the ranks. 1: the optimizer's state; 2: gradients too; 3:
    weights too."""
    offload_optimizer: bool = False
    """With DeepSpeed: the optimizer's state and step on the CPU, in its memory."""
    checkpoint_activations: bool = False
    """Compute each block again in the backward pass: a third more work, far fewer activations."""
    compile: bool = False
    """torch.compile each block: minutes at the start, faster steps."""

    def __post_init__(self) -> None:
        if self.offload_optimizer and (self.kind != "zero" or self.zero_stage == 0):
            raise ValueError(
                "parallel.offload_optimizer needs parallel.kind=zero and zero_stage 1, 2 or 3"
            )


def make_strategy(config: ParallelConfig, writer: "CheckpointWriter") -> "Strategy | str":
    """Lightning's strategy, or its name. writer: of checkpoints, where each rank has a share."""
    if config.kind == "zero":
        from train.parallel.zero import ZeroStrategy

        return ZeroStrategy(config.zero_stage, config.offload_optimizer, writer)
    if config.kind == "fsdp":
        from train.parallel.fsdp import FsdpStrategy

        return FsdpStrategy(writer)
    return "auto"


def prepare_blocks(model: FlashSTU, config: ParallelConfig) -> None:
    """Have each block computed as `config` says."""
    for block in model.blocks:
        if config.compile:
            block.forward = torch.compile(block.forward)
        if config.checkpoint_activations:  # around it: inside, it would end the compiled graph
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
