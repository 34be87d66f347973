"""Checkpoints where each rank holds a part of the model: each writes a share of the tensors."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.folder import TENSOR_KEYS, WEIGHT, CheckpointFolder
from train.checkpoint.writer import CheckpointWriter
from train.optimizer import parameter_groups


class ShardedSaving:
    """Mixin for a Lightning strategy, to be listed before it among base classes."""

    writer: CheckpointWriter

    @property
    def state_tensors(self: Any) -> dict[str, list[str]]:
        """Names of the tensors that the optimizer keeps for each parameter, by the parameter's."""
        module = self.lightning_module
        groups = parameter_groups(module.model, module.optimizer_config)
        return {name: group["state_tensors"] for group in groups for name in group["params"]}

    @abstractmethod
    def gathered(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield kind, name and whole tensor of each; collective, in the same order on all ranks."""

    @abstractmethod
    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and whole tensor of each weight, as the model computes with it; collective, in
        the same order on all ranks."""

    @abstractmethod
    def scatter(self, folder: CheckpointFolder) -> None:
        """Load this rank's part of each tensor."""

    @abstractmethod
    def optimizer_step_count(self) -> int:
        """Return the number of steps that the PyTorch optimizer has taken."""

    @abstractmethod
    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of the PyTorch optimizer."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return nothing: the whole would be gathered on every rank at once."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return nothing, for the same reason."""
        return {}

    def step_tensor(self, held: Tensor, step: int) -> Tensor:
        """Return a number of steps as the optimizer keeps it for a tensor that it updates: if it is
        fused, on the tensor's device."""
        is_fused = self.optimizer_groups()[0].get("fused")
        return torch.tensor(float(step), device=held.device if is_fused else "cpu")

    def save_checkpoint(
        self: Any, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Begin to save; collective."""
        path = Path(filepath)
        if self.is_global_zero:
            self.writer.open(path, self._training(checkpoint))
        self.barrier()
        self.writer.write(path, self.global_rank, self._own_share())

    def load_checkpoint(
        self: Any, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return what Lightning restores; `load_model_state_dict` loads the tensors."""
        self._folder = CheckpointFolder(Path(checkpoint_path))
        return dict(self._folder.training)

    def load_model_state_dict(
        self: Any, checkpoint: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Load the weights and the optimizer's state."""
        self.scatter(self._folder)
        for name, buffer in self.lightning_module.model.named_buffers():
            buffer.copy_(self._folder.tensor(WEIGHT, name))  # the filters that it was trained with
        saved_groups = self._folder.optimizer_groups
        for group, saved in zip(self.optimizer_groups(), saved_groups, strict=True):
            # Another device may have saved it, where another implementation is the fastest.
            group.update({name: saved[name] for name in saved if name not in ("params", "fused")})
        del self._folder  # a map of its files would keep them in use after they are deleted

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Do nothing: `load_model_state_dict` has loaded it."""

    def _own_share(self: Any) -> Iterator[tuple[str, str, Tensor]]:
        for number, (kind, name, tensor) in enumerate(self.gathered()):
            if number % self.world_size == self.global_rank:
                yield kind, name, tensor
        if self.is_global_zero:
            for name, buffer in self.lightning_module.model.named_buffers():
                yield WEIGHT, name, buffer

    def _training(self: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
        training = {name: checkpoint[name] for name in checkpoint if name not in TENSOR_KEYS}
        names = training["stu"].pop("parameter_groups")
        training["optimizer_groups"] = [
            {**group, "params": params}
            for group, params in zip(self.optimizer_groups(), names, strict=True)
        ]
        training["optimizer_step"] = self.optimizer_step_count()
        training["stu"]["num_files"] = self.world_size
        return training
