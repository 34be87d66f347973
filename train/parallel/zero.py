"""DeepSpeed's ZeRO as a Lightning strategy, on GPUs (NCCL) and on CPUs (gloo).

Checkpoints have the format of `train.checkpoint.folder`, by parameter: any number of ranks at any
stage can continue from them, and no pickle is read, unlike in DeepSpeed's own format.
"""

import collections
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for a device when it is imported

if is_hidden := "mlflow" not in sys.modules:
    # DeepSpeed's autotuner, which is not used, would import it for seconds and start threads.
    sys.modules["mlflow"] = None  # type: ignore[assignment]

import deepspeed
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor

from train.checkpoint.folder import WEIGHT, CheckpointFolder
from train.checkpoint.sharded import ShardedSaving
from train.checkpoint.writer import CheckpointWriter
from train.optimizer.adamw import DeviceAdamW
from train.optimizer.matrices import Part
from train.optimizer.muon import Muon

if is_hidden:
    del sys.modules["mlflow"]


class ZeroStrategy(ShardedSaving, DeepSpeedStrategy):
    """ZeRO's stage 0 to 3; `offload` keeps the optimizer's state on the CPU and steps there."""

    def __init__(self, stage: int, offload: bool, writer: CheckpointWriter) -> None:
        self._stage, self.writer = stage, writer
        super().__init__(
            stage=stage,
            zero_optimization=stage > 0,
            offload_optimizer=offload,
            # PyTorch's optimizers take the step: DeepSpeed's would be compiled at the first start.
            zero_allow_untested_optimizer=True,
            contiguous_gradients=True,
            overlap_comm=get_accelerator().device_name() == "cuda",
        )
        assert isinstance(self.config, dict)
        self.config["zero_force_ds_cpu_optimizer"] = False

    @property
    def root_device(self) -> torch.device:
        if isinstance(self.accelerator, CPUAccelerator):
            return torch.device("cpu", self.local_rank)
        return super().root_device

    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        # DeepSpeed would spend a minute compiling operations that PyTorch has as well.
        deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
        self._process_group_backend = "gloo"
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def init_deepspeed(self) -> None:
        if self.zero_stage_3:
            # The loss reads this weight outside of its module.
            matrix = self._flash_stu.embedding.weight
            deepspeed.zero.register_external_parameter(self.lightning_module, matrix)
        super().init_deepspeed()
        if self._stage in (0, 3):
            self._skip_bad_updates()
        if isinstance(self._torch_optimizer, DeviceAdamW):
            # It was made while the parameters were on the CPU.
            self._torch_optimizer.choose([held for held, _ in self._updated_tensors()])
        if self._stage > 0 and isinstance(self._torch_optimizer, Muon):
            self._torch_optimizer.divide(self._matrix_parts(), self.root_device)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided the loss by the number of micro-batches; DeepSpeed must not again.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def gathered(self) -> Iterator[tuple[str, str, Tensor]]:
        has_state, state_tensors = self.optimizer_step_count() > 0, self.state_tensors
        if has_state:
            self._link_state()
        for name, parameter in self._named_parameters():
            yield WEIGHT, name, self._full(parameter, None)
            for kind in state_tensors.get(name, ()) if has_state else ():
                yield kind, name, self._full(parameter, kind)

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
                yield name, parameter.detach()

    def optimizer_step_count(self) -> int:
        states = list(self._torch_optimizer.state.values())
        return int(states[0]["step"]) if states else 0

    def optimizer_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._torch_optimizer.param_groups
        return groups

    @torch.no_grad()
    def scatter(self, folder: CheckpointFolder) -> None:
        step, state_tensors = folder.training["optimizer_step"], self.state_tensors
        if step:
            for held, group in self._updated_tensors():
                self._torch_optimizer.state[held] = {
                    "step": self.step_tensor(held, step),
                    **{kind: torch.zeros_like(held) for kind in group["state_tensors"]},
                }
            self._link_state()
        for name, parameter in self._named_parameters():
            self._set(parameter, None, folder.tensor(WEIGHT, name))
            for kind in state_tensors.get(name, ()) if step else ():
                self._set(parameter, kind, folder.tensor(kind, name))
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            pairs = zip(
                self._zero.fp16_partitioned_groups_flat,
                self._zero.fp32_partitioned_groups_flat,
                strict=True,
            )
            for computed, held in pairs:
                computed.copy_(held)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's wrapper of the PyTorch optimizer."""
        return self.deepspeed_engine.optimizer

    @property
    def _torch_optimizer(self) -> Any:
        return self.deepspeed_engine.basic_optimizer

    def _skip_bad_updates(self) -> None:
        """Skip updates whose gradients are not finite, as stages 1 and 2 do by themselves."""
        engine, zero = self.deepspeed_engine, self._zero
        if self._stage == 0:
            # `FlashSTUModule` drops such gradients, and then there is nothing to clip.
            clip = engine.clip_fp32_gradients

            def clip_if_any() -> None:
                if any(parameter.grad is not None for parameter in engine.module.parameters()):
                    clip()

            engine.clip_fp32_gradients = clip_if_any
            return

        def skips_update(update_scale: bool = True) -> Any:
            zero.overflow = False
            zero.check_overflow()  # by itself, DeepSpeed does this for float16 only
            if update_scale:
                return zero._loss_scale_update_and_overflow_cleanup()
            return zero.overflow

        zero._overflow_check_and_loss_scale_update = skips_update

    def _link_state(self) -> None:
        """Tell DeepSpeed which part of the optimizer's state belongs to which parameter."""
        if self._stage in (1, 2):
            # It may have been linked before there was any state.
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    @property
    def _flash_stu(self) -> Any:
        module: Any = self.lightning_module
        return module.model

    def _named_parameters(self) -> list[tuple[str, Any]]:
        return list(self._flash_stu.named_parameters())

    def _updated_tensors(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Return the tensors that the PyTorch optimizer updates on this rank, with their groups."""
        groups = self.optimizer_groups()
        if self._stage == 0:
            return [(parameter, group) for group in groups for parameter in group["params"]]
        if self._stage == 3:
            flat = self._zero.fp32_partitioned_groups_flat
            numbers = self._zero.sub_group_to_group_id
            return [(held, groups[numbers[place]]) for place, held in enumerate(flat)]
        for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(self._zero, name):
                return list(zip(getattr(self._zero, name), groups, strict=True))
        raise AssertionError(f"unknown optimizer of DeepSpeed: {type(self._zero).__name__}")

    def _matrix_parts(self) -> dict[Tensor, list[Part]]:
        """Return which parts of matrices the tensors hold that Muon updates on this rank."""
        zero, updated = self._zero, [held for held, _ in self._updated_tensors()]
        parts: dict[Tensor, list[Part]] = {}
        for number, counts in enumerate(self._torch_optimizer.counts):
            for parameter, count in counts.items():
                shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
                if self._stage == 3:
                    place, offset, share = zero.grad_position[zero.get_param_id(parameter)]
                    # The last ranks' parts are padded.
                    size = max(0, min(share, math.prod(shape) - self.global_rank * share))
                else:
                    place, (offset, size) = number, (0, 0)
                    if (held := parameter._hp_mapping) is not None:
                        address = held.hp_fragment_address
                        offset, size = address.start, address.numel
                part = Part(updated[place], offset, size, shape, count)
                parts.setdefault(part.held, []).append(part)
        return parts

    def _full(self, parameter: Any, kind: str | None) -> Any:
        """Return a whole tensor: the weight, or the state tensor `kind`; collective."""
        if self._stage == 0:
            state = self._torch_optimizer.state
            return parameter.detach() if kind is None else state[parameter][kind]
        if not parameter.requires_grad:  # the optimizer holds no float32 copy of it
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
                return parameter.detach().float()
        if kind is None:
            return deepspeed.utils.safe_get_full_fp32_param(parameter)
        return deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)

    def _set(self, parameter: Any, kind: str | None, value: Tensor) -> None:
        """Set this rank's part of a tensor to that of the whole `value`."""
        if self._stage == 0:
            held = parameter if kind is None else self._torch_optimizer.state[parameter][kind]
            held.copy_(value)
        elif self._stage < 3 and not parameter.requires_grad:
            parameter.data.copy_(value)
        elif self._stage < 3 and kind is None:
            deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        elif self._stage < 3:
            deepspeed.utils.safe_set_full_optimizer_state(parameter, value, kind)
        else:
            count = parameter.ds_tensor.numel()
            padded = value.new_zeros(count * self.world_size)
            padded[: value.numel()] = value.flatten()
            own = padded[self.global_rank * count :][:count]
            if not parameter.requires_grad:
                parameter.ds_tensor.copy_(own)
            elif kind is None:
                deepspeed.utils.safe_set_local_fp32_param(parameter, own)
            else:
                deepspeed.utils.safe_set_local_optimizer_state(parameter, own, kind)
