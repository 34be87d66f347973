"""PyTorch's fully sharded data parallelism (FSDP2) as a Lightning strategy, on GPUs and CPUs.

A block's weights are gathered when it is computed, in bfloat16 for mixed precision, and its
gradients are summed over the ranks in float32. Each rank keeps its part of the weights, and takes
the optimizer's steps, in float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from stu.model import FlashSTU
from train.checkpoint.folder import WEIGHT, CheckpointFolder
from train.checkpoint.sharded import ShardedSaving
from train.checkpoint.writer import CheckpointWriter


class FsdpStrategy(ShardedSaving, ModelParallelStrategy):
    """Strategy that divides weights, gradients and the optimizer's state among all ranks."""

    def __init__(self, writer: CheckpointWriter) -> None:
        super().__init__(tensor_parallel_size=1)
        self.writer = writer

    def setup_environment(self) -> None:
        # By default, the ranks of one node would hold copies.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def divide(self, model: FlashSTU) -> None:
        """Divide the model by blocks; weights outside of blocks stay gathered during a step."""
        is_half = self.precision_plugin.precision == "bf16-mixed"
        filters = [module for mixer in model.mixers for module in mixer.filter_modules]
        for module in (*filters, *model.blocks, model):
            is_rounded = is_half and module not in filters
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if is_rounded else None,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,  # the filters of an STU are an input, and stay float32
            )
            fully_shard(module, mesh=self.device_mesh["data_parallel"], mp_policy=policy)
        register_fsdp_forward_method(model, "hidden")

    def gathered(self) -> Iterator[tuple[str, str, Tensor]]:
        state_tensors = self.state_tensors
        for name, parameter in self._parameters():
            yield WEIGHT, name, _whole(parameter)
            state = self.optimizers[0].state.get(parameter, {})
            for kind in state_tensors[name] if state else ():
                yield kind, name, _whole(state[kind])

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, _whole(parameter)) for name, parameter in self._parameters())

    def optimizer_step_count(self) -> int:
        states = list(self.optimizers[0].state.values())
        return int(states[0]["step"]) if states else 0

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return self.optimizers[0].param_groups

    @torch.no_grad()
    def scatter(self, folder: CheckpointFolder) -> None:
        step, state_tensors = folder.training["optimizer_step"], self.state_tensors
        for name, parameter in self._parameters():
            parameter.copy_(_like(parameter, folder.tensor(WEIGHT, name)))
            if step and parameter.requires_grad:
                self.optimizers[0].state[parameter] = {
                    "step": self.step_tensor(parameter, step),
                    **{k: _like(parameter, folder.tensor(k, name)) for k in state_tensors[name]},
                }

    def _parameters(self) -> list[tuple[str, DTensor]]:
        module: Any = self.lightning_module
        module.model.reshard()  # after a validation, weights outside of blocks are still gathered
        return list(module.model.named_parameters())


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.detach().full_tensor()
    return whole


def _like(parameter: DTensor, whole: Tensor) -> DTensor:
    """Return this rank's part of `whole`, which every rank has."""
    return distribute_tensor(
        whole.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        src_data_rank=None,
    )
