"""Settings for dividing a model among ranks, and the Lightning strategy that they select."""

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch.utils.checkpoint import checkpoint

from stu.common.errors import UserError
from stu.model import FlashSTU

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from train.checkpoint.writer import CheckpointWriter


@dataclass(frozen=True)
class ParallelConfig:
    """Division of a model among ranks, and recomputation that saves memory."""

    kind: Literal["ddp", "zero", "fsdp"] = "ddp"
    """Strategy. `ddp`: every rank holds the whole model. `zero`: DeepSpeed, see `zero_stage`.
    `fsdp`: PyTorch's FSDP2, which shards everything, as ZeRO stage 3 does."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """Stage of DeepSpeed's ZeRO: what is sharded across ranks. 0: nothing; 1: the optimizer state;
    2: gradients too; 3: weights too."""
    offload_optimizer: bool = False
    """Keep the optimizer state in CPU memory, and step on the CPU. For `zero` with stages 1 to
    3."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass: a third more computation, far less memory for
    activations."""
    context: int = 1
    """Number of neighbouring ranks that divide each sequence among them (context parallelism), each
    keeping the activations of its own part. It must divide `data.seq_len` and the number of
    ranks."""
    compile: bool = False
    """Compile each block with torch.compile, which takes minutes at the start and makes steps
    faster."""

    def __post_init__(self) -> None:
        if self.context < 1:
            raise UserError("parallel.context", self.context, "a whole number >= 1")
        if self.kind != "zero" and self.zero_stage != 1:
            fix = "it needs parallel.kind=zero"
            raise UserError("parallel.zero_stage", self.zero_stage, fix=fix)
        if self.offload_optimizer and (self.kind != "zero" or self.zero_stage == 0):
            raise UserError(
                "parallel.offload_optimizer",
                True,
                fix="it needs parallel.kind=zero and zero_stage 1, 2 or 3",
            )

    def check_ranks(self, num_ranks: int) -> None:
        """Raise UserError unless the ranks divide into groups of `context`."""
        if num_ranks % self.context:
            ranks = f"{num_ranks} rank{'s' * (num_ranks > 1)}"
            allowed = f"a divisor of the number of ranks ({ranks})"
            raise UserError("parallel.context", self.context, allowed)


def make_strategy(
    config: ParallelConfig, writer: "CheckpointWriter", accelerator: object
) -> "Strategy | str":
    """Return Lightning's strategy, or its name.

    Args:
        config: Settings of the strategy.
        writer: This rank's writer of checkpoints, for strategies that divide the model.
        accelerator: `trainer.accelerator`.
    """
    if config.kind == "zero":
        if accelerator == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed, once imported, would take a GPU
        from train.parallel.zero import ZeroStrategy

        return ZeroStrategy(config.zero_stage, config.offload_optimizer, writer)
    if config.kind == "fsdp":
        from train.parallel.fsdp import FsdpStrategy

        return FsdpStrategy(writer)
    return "auto"


def prepare_blocks(model: FlashSTU, config: ParallelConfig) -> None:
    """Compile and recompute each block as `config` says, in place."""
    for block in model.blocks:
        if config.compile:
            block.forward = torch.compile(block.forward)
        if config.checkpoint_activations:  # outermost: inside, it would break the compiled graph
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
