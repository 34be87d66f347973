"""Low-rank adapters (LoRA): a frozen model with a trained product of two narrow matrices beside
each of its linear layers.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685. Settings,
names of tensors and initialisation are those of the peft library.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.common.errors import UserError
from stu.model import FlashSTU

ALL = "all-linear"
RECORD = "lora"
"""Name of the settings' group, and key in the record that checkpoints carry."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA), which are trained instead of the model."""

    r: int = 0
    """Rank of the adapters; 0 trains the whole model, without adapters."""
    lora_alpha: float = 16.0
    """An adapter's output is multiplied by `lora_alpha / r`."""
    lora_dropout: float = 0.0
    """Dropout probability of an adapter's inputs in training."""
    target_modules: list[str] | str = ALL
    """Linear layers with adapters, by the last part of their names, such as `[qkv, gate, up]`;
    `all-linear` for all. The matrices of an STU get no adapters."""

    def __post_init__(self) -> None:
        for name, holds, allowed in [
            ("r", self.r >= 0, "a whole number >= 0"),
            ("lora_alpha", 0 < self.lora_alpha < math.inf, "a positive number"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "at least 0 and below 1"),
        ]:
            if not holds:
                raise UserError(f"{RECORD}.{name}", getattr(self, name), allowed)
        for field in () if self.r else fields(self):
            if (value := getattr(self, field.name)) != field.default:
                fix = f"it needs {RECORD}.r, as without adapters it has no effect"
                raise UserError(f"{RECORD}.{field.name}", value, fix=fix)

    @property
    def scale(self) -> float:
        """Factor of an adapter's output."""
        return self.lora_alpha / self.r


class AdaptedLinear(nn.Module):
    """A linear layer plus `scale * lora_B(lora_A(x))`, under the layer's own name.

    The layer's weight keeps its name too. `lora_B` begins at 0, so that nothing changes at first.
    """

    def __init__(
        self, layer: nn.Linear, config: LoraConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Linear(layer.in_features, config.r, bias=False)
        self.lora_B = nn.Linear(config.r, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout, self.scale = config.lora_dropout, config.scale

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.lora_B(self.lora_A(F.dropout(x, self.dropout, self.training)))
        return F.linear(x, self.weight, self.bias) + self.scale * added


def adapted_layers(model: FlashSTU, config: LoraConfig) -> dict[str, nn.Linear]:
    """Return the linear layers that get adapters, by name. Raises UserError if there are none of a
    name that `config` gives."""
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    known = {name.rpartition(".")[2] for name in linear}
    given = config.target_modules
    wanted = known if given == ALL else {given} if isinstance(given, str) else set(given)
    if not wanted or not wanted <= known:
        allowed = f"{ALL}, or a list of some of {', '.join(sorted(known))}"
        raise UserError(f"{RECORD}.target_modules", config.target_modules, allowed)
    return {name: layer for name, layer in linear.items() if name.rpartition(".")[2] in wanted}


def add_adapters(model: FlashSTU, config: LoraConfig) -> None:
    """Freeze `model`, and put adapters beside its `adapted_layers`, in place.

    They are drawn from the seed of torch's global generator, not from its state, so that all ranks
    have the same. Raises UserError as `adapted_layers` does.
    """
    layers = adapted_layers(model, config)
    generator = torch.Generator().manual_seed(torch.initial_seed())
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, AdaptedLinear(layer, config, generator))


def adapter_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of adapters among a model's `weights`, by name."""
    return {name: tensor for name, tensor in weights.items() if ".lora_" in name}


@torch.no_grad()
def merged(weights: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Return the weights of the model that computes the same without adapters."""
    adapters = adapter_tensors(weights)
    result = {name: tensor for name, tensor in weights.items() if name not in adapters}
    for name, narrow in adapters.items():
        layer, _, kind = name.partition(".lora_")
        if kind != "A.weight":
            continue
        product = adapters[f"{layer}.lora_B.weight"].double() @ narrow.double()
        weight = result[f"{layer}.weight"]
        result[f"{layer}.weight"] = (weight.double() + config.scale * product).to(weight.dtype)
    return result
