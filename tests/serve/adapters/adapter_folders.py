"""Folders of adapters as peft writes them, and models that have them merged."""

import copy
import json

import torch
from safetensors.torch import save_file
from torch import nn

PREFIX = "base_model.model.model."


def write_adapter(path, model, rank=3, alpha=6.0, seed=0, only=("",), **settings):
    """Write an adapter of the layers of `model` whose names end with one of `only`, and return the
    model with it merged."""
    generator = torch.Generator().manual_seed(seed)
    merged, tensors = copy.deepcopy(model), {}
    for name, layer in merged.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(tuple(only)):
            outputs, inputs = layer.weight.shape
            a = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            b = torch.randn(outputs, rank, generator=generator) * rank**-0.5
            tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
            layer.weight.data += alpha / rank * (b @ a)
    path.mkdir()
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", **settings}
    (path / "adapter_config.json").write_text(json.dumps(values))
    save_file(tensors, path / "adapter_model.safetensors")
    return merged
