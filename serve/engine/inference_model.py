"""A model's layers as the engine runs them: the same functions, with weights in other layouts."""

import copy
import logging
from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

from torch import Tensor, nn

from serve.engine.int8 import Int8GatedMLP, Int8Linear, has_int8
from serve.engine.packing import PackedGatedMLP, PackedLinear, packs
from serve.kernels.dispatch import uses_triton
from serve.kernels.modules import KernelGatedMLP, KernelRMSNorm
from stu.common.errors import UserError
from stu.config import Weights
from stu.layers import GatedMLP, RMSNorm
from stu.mixers import Mixer
from stu.model import FlashSTU

logger = logging.getLogger(__name__)


class _Layers(NamedTuple):
    """Modules that replace those of a model."""

    mlp: Callable[[GatedMLP], nn.Module]
    linear: Callable[[Tensor], nn.Module] | None = None
    norm: Callable[[RMSNorm], nn.Module] | None = None


def chosen_weights(asked: Weights | None, model: FlashSTU) -> Weights:
    """Return the format that `EngineConfig.weights` asks for; by default that of the model
    directory, if it runs on the model's device."""
    if asked is not None or model.weights == "float":
        return asked or "float"
    if _runs_int8(model.embedding.weight):
        return "int8"
    logger.warning(
        "the model directory has weights of 8 bits, which run on x86 processors alone; they are "
        "decoded as floats here"
    )
    return "float"


def inference_copy(model: FlashSTU, weights: Weights = "float") -> FlashSTU:
    """Return a copy of `model` for inference, which shares the tensors that it does not replace.

    float: linear layers are packed, where they can be; on CUDA, norms and MLPs run kernels, and the
    gate and up weights of an MLP of `model` move into one matrix. int8: weights have 8 bits. Packed
    weights are in memory twice while `model` is referenced. Raises UserError where int8 is not to
    be had.
    """
    tensors = chain(model.parameters(), model.buffers())
    shared: dict[int, object] = {id(tensor): tensor for tensor in tensors}
    copied = copy.deepcopy(model, shared)
    layers = _layers(model.embedding.weight, weights)
    if layers is not None:
        for module in list(copied.modules()):
            for name, child in module.named_children():
                setattr(module, name, _replaced(child, layers))
    return copied


def inference_product(weight: Tensor, weights: Weights = "float") -> Callable[[Tensor], Tensor]:
    """Return the function `x -> x @ weight.T` for inference."""
    layers = _layers(weight, weights)
    if layers is not None and layers.linear is not None:
        return layers.linear(weight)
    return lambda x: nn.functional.linear(x, weight)


def _layers(weight: Tensor, weights: Weights) -> _Layers | None:
    """Return the modules for weights like this one; None: those of the model."""
    if weights == "float":
        if packs(weight):
            return _Layers(PackedGatedMLP, PackedLinear)
        return _Layers(KernelGatedMLP, norm=KernelRMSNorm) if uses_triton(weight) else None
    if not _runs_int8(weight):
        fix = "8 bits run on x86 processors, with a torch that was built with FBGEMM"
        raise UserError("weights", weights, "float", fix)
    return _Layers(Int8GatedMLP, Int8Linear)


def _runs_int8(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and has_int8()


def _replaced(module: nn.Module, layers: _Layers) -> nn.Module:
    """Return `module`, or the one to use instead."""
    if isinstance(module, GatedMLP):
        return layers.mlp(module)
    if isinstance(module, RMSNorm) and layers.norm is not None:
        return layers.norm(module)
    if layers.linear is None:
        return module
    if isinstance(module, Mixer):
        module.pack(layers.linear)
    if isinstance(module, nn.Linear):
        return layers.linear(module.weight)
    return module
