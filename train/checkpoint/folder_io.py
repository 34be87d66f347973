"""Saving and loading checkpoints where every rank holds the whole model: one rank writes them."""

import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from train.checkpoint.folder import TENSOR_KEYS, WEIGHT, CheckpointFolder
from train.checkpoint.writer import CheckpointWriter

PREFIX = "model."
"""Prefix of parameter names in the Lightning module, which checkpoints leave out."""


class FolderIO(CheckpointIO):
    """Lightning's plugin that stores its dictionaries as checkpoint folders."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self._writer = writer

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        training = {name: checkpoint[name] for name in checkpoint if name not in TENSOR_KEYS}
        (optimizer,) = checkpoint["optimizer_states"]
        groups = training["stu"].pop("parameter_groups")
        training["optimizer_groups"] = [
            {**group, "params": names}
            for group, names in zip(optimizer["param_groups"], groups, strict=True)
        ]
        states = optimizer["state"]
        training["optimizer_step"] = int(states[0]["step"]) if states else 0

        def tensors() -> Iterator[tuple[str, str, Tensor]]:
            for name, tensor in checkpoint["state_dict"].items():
                yield WEIGHT, name.removeprefix(PREFIX), tensor
            numbers = count()
            for group in training["optimizer_groups"]:
                for name, number in zip(group["params"], numbers, strict=False):
                    for kind in group["state_tensors"] if states else ():
                        yield kind, name, states[number][kind]

        training["stu"]["num_files"] = 1
        self._writer.open(Path(path), training)
        self._writer.write(Path(path), 0, tensors())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        folder = CheckpointFolder(Path(path))
        # Copies: a map of the file would keep it in use after it is deleted.
        weights = {PREFIX + name: folder.tensor(WEIGHT, name).clone() for name in folder.names}
        return {
            **folder.training,
            "state_dict": weights,
            "optimizer_states": [_torch_state(folder)],
        }

    def remove_checkpoint(self, path: str | Path) -> None:
        shutil.rmtree(path)


def _torch_state(folder: CheckpointFolder) -> dict[str, Any]:
    """Return the optimizer's state as PyTorch has it, where parameters are numbers in the order of
    the groups."""
    states: dict[int, Any] = {}
    groups, step = [], folder.training["optimizer_step"]
    stop = 0
    for group in folder.optimizer_groups:
        numbers = range(stop, stop + len(group["params"]))
        stop = numbers.stop
        groups.append({**group, "params": list(numbers)})
        for number, name in zip(numbers, group["params"], strict=True):
            if step:
                states[number] = {
                    kind: folder.tensor(kind, name).clone() for kind in group["state_tensors"]
                }
                states[number]["step"] = torch.tensor(float(step))
    return {"state": states, "param_groups": groups}
