"""Engines of model directories, on one device or on several that divide the model."""

from collections.abc import Mapping
from pathlib import Path

import torch

from serve.adapters.folder import read_adapter
from serve.config import EngineConfig
from serve.engine.engine import Engine
from stu.common.errors import UserError, requires_extra
from stu.common.machine import limit_threads
from stu.division.parts import check_divides_channels
from stu.model_dir import load_config, load_model
from stu.tokenizer import Tokenizer


def make_engine(
    model: str | Path,
    devices: str,
    dtype: torch.dtype,
    tokenizer: Tokenizer,
    config: EngineConfig,
    ends_process: bool = True,
    adapters: Mapping[str, Path] | None = None,
) -> Engine:
    """Return an engine of a model directory. Nothing else keeps its weights in memory.

    Args:
        model: Model directory.
        devices: torch's name of a device, or names with commas between them: ranks of a group,
            each a process on its device with a part of the model.
        dtype: Type of the weights.
        tokenizer: The model's tokenizer.
        config: Cache size and limits of each rank.
        ends_process: End this process when another rank ends, which leaves this one waiting for it
            on a device. Else the engine's next step raises RuntimeError.
        adapters: Folders of adapters by name, for a model on one device.

    Raises UserError for files and settings that cannot be used, and for a model that so many ranks
    cannot divide.
    """
    limit_threads()
    names = devices.split(",")
    if len(names) == 1:
        shape = load_config(model)
        read = [read_adapter(name, path, shape) for name, path in (adapters or {}).items()]
        weights = config.weights
        return Engine(load_model(model, devices, dtype, weights), tokenizer, config, adapters=read)
    if adapters:
        allowed = "one device where there are adapters, which are not divided"
        raise UserError("devices", devices, allowed)
    check_divides_channels(load_config(model), len(names))
    with requires_extra("serve"):  # msgpack
        from serve.parallel.engine import GroupEngine
    return GroupEngine(model, names, dtype, tokenizer, config, ends_process)
