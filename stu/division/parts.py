"""The parts of a model that a rank has: which tensors are divided, and how they are read."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.division.modules import DividedEmbedding, SummedOutputs
from stu.mixers import KeyWindow, planned_mixers, remembered
from stu.model import Block, FlashSTU
from stu.slices.channels import ChannelRanks, Divided

SCALES = ".scales"
"""Ending of the name of a matrix's scales, where it has 8 bits."""


def check_divides_channels(config: ModelConfig, num_ranks: int) -> None:
    """Raise UserError, naming the numbers that can, if so many ranks cannot divide a model."""
    divisible = {"width": config.width}
    mixers = [mixer for mixer in planned_mixers(config) if mixer.divided]
    if remembered(mixers, KeyWindow):
        divisible["num_heads"] = config.num_heads
    common = math.gcd(*divisible.values())
    if common % num_ranks:
        allowed = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        sizes = " and ".join(f"{name}={size}" for name, size in divisible.items())
        raise UserError("tensor_parallel", num_ranks, f"one of {allowed}, which divide {sizes}")


class Parts:
    """A rank's parts of the tensors of a model, which is still on the meta device. Other tensors
    are whole on every rank.

    Args:
        model: The whole model. It gets the shapes of the parts.
        ranks: Ranks that divide it; None: nothing is divided.

    Raises UserError if they cannot.
    """

    def __init__(self, model: FlashSTU, ranks: ChannelRanks | None) -> None:
        self._ranks = ranks
        self._division: dict[str, Divided] = {}
        """How tensors are divided, by name."""
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        """Shapes of whole tensors."""
        if ranks is not None:
            check_divides_channels(model.config, ranks.size)
            self._divide(model, ranks)

    def read(self, archive: Any, name: str) -> Tensor:
        """Read this rank's part of a tensor of a safetensors file. Raises UserError if it has
        another shape than the model's."""
        how, tensor = self._division.get(name), None
        if how is not None and self._ranks is not None:
            stored = archive.get_slice(name)
            shape, expected = tuple(stored.get_shape()), self._shapes.get(name)
            if expected not in (None, shape):
                problem = f"{name} has shape {shape}, not {tuple(expected or ())}"
                raise UserError(
                    name, message=f"model.safetensors does not fit config.json: {problem}"
                )
            tensor = how.part(stored, shape, self._ranks) if len(shape) > how.dim else None
        return archive.get_tensor(name) if tensor is None else tensor

    def largest_of_all(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """Return what `stu.quantization.quantize` needs for a matrix: None unless ranks have
        different inputs of it."""
        if name not in self._division or name + SCALES in self._division:
            return None
        assert self._ranks is not None
        return self._ranks.largest

    def exchange(self, model: FlashSTU) -> FlashSTU:
        """Let the layers of a model, whose weights are there, exchange what they compute."""
        if self._ranks is None:
            return model
        model.embedding = DividedEmbedding(model.embedding.weight, self._ranks)
        for block in model.blocks:
            assert isinstance(block, Block)
            bias = _without_bias(block.mlp.down)
            block.mlp = SummedOutputs(block.mlp, self._ranks, bias)  # type: ignore[assignment]
            for name in block.mixer.summed:
                projection = block.mixer.get_submodule(name)
                bias = _without_bias(projection)
                setattr(block.mixer, name, SummedOutputs(projection, self._ranks, bias))
        return model

    def _divide(self, model: FlashSTU, ranks: ChannelRanks) -> None:
        division = {"embedding.weight": Divided(0)}
        matrices = model.matrices
        for number, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            for part, own in (("mixer", block.mixer.divided), ("mlp", block.mlp.divided)):
                division |= {f"blocks.{number}.{part}.{name}": how for name, how in own.items()}
        for name, how in division.items():
            path, _, own_name = name.rpartition(".")
            shape = how.shape(self._shapes[name], ranks.size)
            parameter = nn.Parameter(torch.empty(shape, device="meta"))
            setattr(model.get_submodule(path), own_name, parameter)
        scales = {
            name + SCALES: Divided(0, how.groups)
            for name, how in division.items()
            if matrices.get(name) == how.dim  # ranks with different inputs have the same scales
        }
        self._division = division | scales
        model.ranks = ranks
        for mixer in model.mixers:
            if mixer.divided:
                mixer.take_part(ranks)


def _without_bias(module: nn.Module) -> nn.Parameter | None:
    """Remove the bias of a linear layer, and return it."""
    bias = module.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    module.register_parameter("bias", None)
    return bias
