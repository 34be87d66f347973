"""Adapters on disk, in the layout of the peft library, as `stu-export --format adapter` writes.

adapter_config.json
adapter_model.safetensors
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.model import FlashSTU

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIXES = "base_model.model.", "model."
"""Beginnings of names in a file, before the names of layers."""
ABSENT: Mapping[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),
    "use_qalora": (None, False),
}
"""Settings of peft that change what an adapter computes, and the values under which they do not."""


class Narrow(NamedTuple):
    """The two matrices beside a linear layer, which then computes `x W^T + scale * x A^T B^T`."""

    a: Tensor
    """`[rank, in]`."""
    b: Tensor
    """`[out, rank]`."""


@dataclass(frozen=True)
class Adapter:
    """An adapter of a model."""

    name: str
    layers: Mapping[str, Narrow]
    """Matrices by the name of the layer that they are beside."""
    scale: float


def read_adapter(name: str, path: Path, config: ModelConfig) -> Adapter:
    """Return the adapter in a folder, on the CPU. Raises UserError, naming the file, unless it is
    one of a model of this shape."""
    settings = _settings(path / CONFIG)
    layers: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in _tensors(path / WEIGHTS).items():
        own = full_name
        for prefix in PREFIXES:
            own = own.removeprefix(prefix)
        layer, _, part = own.partition(".lora_")
        if part not in ("A.weight", "B.weight"):
            raise _error(path / WEIGHTS, f"{full_name} is no part of an adapter of linear layers")
        layers.setdefault(layer, {})[part[0]] = tensor
    if not layers:
        raise _error(path / WEIGHTS, "it has no tensors")
    rank, shapes = settings["r"], _linear_shapes(config)
    for layer, parts in layers.items():
        _check(path / WEIGHTS, layer, parts, shapes)
        if len(parts["A"]) != rank:
            message = f"{layer} has rank {len(parts['A'])}, and {CONFIG} says r={rank}"
            raise _error(path / WEIGHTS, f"{message}: is it of another adapter?")
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return Adapter(name, {own: Narrow(p["A"], p["B"]) for own, p in layers.items()}, scale)


def _settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        message = f"no such file; is {file.parent} a folder of peft's?"
        raise _error(file, message) from error
    except (OSError, ValueError) as error:
        raise _error(file, f"cannot be read ({error})") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise _error(file, 'it must be an object with "peft_type": "LORA"')
    for name, least in (("r", 1), ("lora_alpha", 0)):
        value = settings.get(name, math.nan)
        if type(value) not in (int, float) or not least <= value < math.inf:
            raise _error(file, f"{name}={json.dumps(value)} is not a number from {least}")
    for name, values in ABSENT.items():
        if settings.get(name) not in values:
            shown = json.dumps(settings[name])[:60]
            raise _error(file, f"{name}={shown} is not supported: merge the adapter instead")
    return settings


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as archive:
            return {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _error(file, f"not a whole safetensors file ({error})") from error


def _linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return the shapes `[out, in]` of a model's linear layers by name."""
    with torch.device("meta"):
        model = FlashSTU(config)
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }


def _check(
    file: Path, layer: str, parts: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Raise UserError unless both matrices of a layer fit it and each other."""
    if layer not in shapes:
        raise _error(file, f"the model has no linear layer {layer}: is it of another model?")
    if parts.keys() != {"A", "B"}:
        raise _error(file, f"{layer} has only one of lora_A and lora_B")
    a, b, (outputs, inputs) = parts["A"], parts["B"], shapes[layer]
    are_floats = a.is_floating_point() and b.is_floating_point()
    fits = a.ndim == b.ndim == 2 and a.shape == (len(a), inputs) and b.shape == (outputs, len(a))
    if not (are_floats and fits):
        raise _error(
            file,
            f"{layer} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, which do not fit "
            f"its {inputs} inputs and {outputs} outputs: is it of another model?",
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise _error(file, f"{layer} has numbers that are not finite")


def _error(file: Path, message: str) -> UserError:
    return UserError("lora_modules", message=f"{file}: {message}")
