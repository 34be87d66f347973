"""Checkpoints of strategies whose ranks each hold a part: each rank writes a share of the whole."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from train.checkpoint.callback import OF_TENSORS
from train.checkpoint.folder import WEIGHT, CheckpointFolder
from train.checkpoint.writer import CheckpointWriter
from train.optimizer import parameter_groups


class ShardedSaving:
    """To be mixed into a Lightning strategy, before it."""

    writer: CheckpointWriter

    @property
    def state_tensors(self: Any) -> tuple[str, ...]:
        """Names of the tensors that the optimizer keeps for each parameter."""
        names: tuple[str, ...] = self.lightning_module.optimizer_kind.state_tensors
        return names

    @abstractmethod
    def gathered(self) -> Iterator[tuple[str, str, Tensor]]:
        """Kind, name and whole tensor, one after the other; all ranks together, in one order."""

    @abstractmethod
    def scatter(self, folder: CheckpointFolder) -> None:
        """Of each tensor, what this rank holds."""

    @abstractmethod
    def optimizer_step_count(self) -> int:
        """Steps that torch's optimizer has taken."""

    @abstractmethod
    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Of torch's optimizer, with their learning rates."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: it would be gathered on every rank at once."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing, likewise."""
        return {}

    def save_checkpoint(
        self: Any, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Begin to, all ranks together."""
        path = Path(filepath)
        if self.is_global_zero:
            self.writer.open(path, self._training(checkpoint))
        self.barrier()
        self.writer.write(path, self.global_rank, self._own_share())

    def load_checkpoint(
        self: Any, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What Lightning restores by itself; tensors come with `load_model_state_dict`."""
        self._folder = CheckpointFolder(Path(checkpoint_path))
        return dict(self._folder.training)

    def load_model_state_dict(
        self: Any, checkpoint: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Weights, and the optimizer's state with them."""
        self.scatter(self._folder)
        for name, buffer in self.lightning_module.model.named_buffers():
            buffer.copy_(self._folder.tensor(WEIGHT, name))  # the filters that it was trained with
        for group, saved in zip(
            self.optimizer_groups(), self._folder.training["optimizer_groups"], strict=True
        ):
            group.update({name: saved[name] for name in saved if name != "params"})
        del self._folder  # a map of its files would keep them in use after they are deleted

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing is left to do."""

    def _own_share(self: Any) -> Iterator[tuple[str, str, Tensor]]:
        for number, (kind, name, tensor) in enumerate(self.gathered()):
            if number % self.world_size == self.global_rank:
                yield kind, name, tensor
        if self.is_global_zero:
            for name, buffer in self.lightning_module.model.named_buffers():
                yield WEIGHT, name, buffer

    def _training(self: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
        training = {name: checkpoint[name] for name in checkpoint if name not in OF_TENSORS}
        names = parameter_groups(self.lightning_module.model)
        training["optimizer_groups"] = [
            {**{key: group[key] for key in group if key != "params"}, "params": its}
            for group, its in zip(self.optimizer_groups(), names, strict=True)
        ]
        training["optimizer_step"] = self.optimizer_step_count()
        training["stu"].pop("parameter_groups")
        training["stu"]["num_files"] = self.world_size
        return training
