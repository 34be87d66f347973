"""Adapters (LoRA) on disk, in the layout of the peft library.

    adapter_config.json
    adapter_model.safetensors

Names are those of the model that `stu-export --format transformers` writes of the same base, to
which peft adds them.
"""

import json
from pathlib import Path
from typing import Any

import torch

from stu.common.errors import UserError
from stu.common.files import new_directory
from stu.common.safetensors import write_safetensors
from train.checkpoint.folder import WEIGHT, CheckpointFolder
from train.lora import LoraConfig, adapter_tensors

PREFIX = "base_model.model.model."


def save_adapters(
    path: Path, folder: CheckpointFolder | None, dtype: torch.dtype, overwrite: bool = False
) -> None:
    """Write the adapters of a training checkpoint, cast to `dtype`.

    Raises UserError if it has none, or if `path` is occupied and `overwrite` is off.
    """
    carried: dict[str, Any] = {} if folder is None else folder.training["stu"]
    if folder is None or "lora" not in carried:
        fix = "it needs a checkpoint of a run with adapters (--lora.r)"
        raise UserError("format", "adapter", fix=fix)
    config = LoraConfig(**carried["lora"])
    weights = adapter_tensors({name: folder.tensor(WEIGHT, name) for name in folder.names})
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in weights}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": carried["init_from"]["path"],
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": sorted(layers),
        "bias": "none",
        "inference_mode": True,
    }
    with new_directory(path, overwrite) as output:
        (output / "adapter_config.json").write_text(json.dumps(values, indent=2) + "\n")
        tensors = {PREFIX + name: tensor for name, tensor in weights.items()}
        dtypes, metadata = dict.fromkeys(tensors, dtype), {"format": "pt"}
        write_safetensors(output / "adapter_model.safetensors", tensors, metadata, dtypes)
