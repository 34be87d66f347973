"""A model's layers as the engine runs them: the same functions, with weights in other layouts."""

import copy
import logging
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from serve.adapters.layers import Adapters, adapt, is_adapted
from serve.config import EngineWeights
from serve.engine.int8 import Int8GatedMLP, Int8Linear, has_int8
from serve.engine.packing import USUAL_ROWS, PackedGatedMLP, PackedLinear, gelu_of_rows, packs
from serve.kernels.dispatch import uses_triton
from serve.kernels.modules import KernelRMSNorm, NarrowLinear, kernel_mlp, narrow_mlp
from stu.common.errors import UserError
from stu.division.modules import SummedOutputs
from stu.layers import GatedMLP, PlainMLP, RMSNorm
from stu.mixers import PastInputs, remembered
from stu.model import FlashSTU
from stu.quantization import ByteWeights, Quantized, QuantizedLinear, quantize, quantized

logger = logging.getLogger(__name__)

FP8_CAPABILITY = 8, 9
"""Compute capability from which GPUs have floats of 8 bits."""


class _Layers(NamedTuple):
    """Modules that replace those of a model."""

    mlp: Callable[[GatedMLP], nn.Module]
    linear: Callable[[Any], nn.Module] | None = None
    """Takes a float weight, or where products have weights of 8 bits a `Quantized` one too."""
    norm: Callable[[RMSNorm], nn.Module] | None = None


def chosen_weights(asked: EngineWeights | None, model: FlashSTU) -> EngineWeights:
    """Return the format that `EngineConfig.weights` asks for; by default that of the model, or
    float where the model has int8 and its device does not run that."""
    if asked is not None or model.weights != "int8":
        return asked or model.weights
    if _runs_int8(model.embedding.weight):
        return "int8"
    logger.warning(
        "the model directory has weights of 8 bits, which run on CUDA and x86 processors alone; "
        "they are decoded as floats here"
    )
    return "float"


def inference_copy(
    model: FlashSTU,
    weights: EngineWeights = "float",
    adapters: Adapters | None = None,
    usual_rows: int = USUAL_ROWS,
    batch_invariant: bool = False,
) -> FlashSTU:
    """Return a copy of `model` for inference, with adapters beside layers. It shares the tensors
    that it does not replace.

    On CUDA, both matrices of a full form of `model` move into one tensor. float: linear layers are
    packed, where they can be; on CUDA, norms and MLPs run kernels, and the gate and up weights of
    an MLP of `model` move into one matrix. int8, fp8: weights have 8 bits; those that `model` has
    in this format are shared on CUDA. Other weights that are replaced are in memory twice while
    `model` is referenced. Raises UserError for a format that the device does not run.

    Args:
        model: Model to copy.
        weights: Format of the weights.
        adapters: Adapters of the rows.
        usual_rows: Number of rows of a usual step, for the layout of floats on a CPU.
        batch_invariant: Let no row's results depend on its place, which takes longer.
    """
    layers = _layers(model.embedding.weight, weights, usual_rows)
    tensors = chain(model.parameters(), model.buffers())
    shared: dict[int, object] = {id(tensor): tensor for tensor in tensors}
    copied = copy.deepcopy(model, shared)
    for mixer in copied.mixers:
        mixer.pack(None if layers is None else layers.linear)
    if adapters is not None:
        adapt(copied, adapters, inference_product)
    if weights == "float":
        _replace(copied, partial(_float, dtype=model.embedding.weight.dtype))
    if layers is not None:
        _replace(copied, partial(_replaced, layers=layers, weights=weights))
    takes_rows_apart = batch_invariant and model.embedding.weight.device.type == "cpu"
    for module in copied.modules():
        if takes_rows_apart and isinstance(module, GatedMLP | PlainMLP | Int8GatedMLP):
            module.activation = gelu_of_rows
        if isinstance(module, SummedOutputs):
            for product in (module.inner, getattr(module.inner, "down", None)):
                if isinstance(product, Int8Linear):
                    product.sum_over(module.ranks)
                    module.is_summed = True
    return copied


def inference_product(
    weight: Tensor, weights: EngineWeights = "float", usual_rows: int = USUAL_ROWS
) -> Callable[[Tensor], Tensor]:
    """Return the function `x -> x @ weight.T` for inference."""
    layers = _layers(weight, weights, usual_rows)
    if layers is not None and layers.linear is not None:
        return layers.linear(weight)
    return partial(nn.functional.linear, weight=weight)


def require_invariance(model: FlashSTU) -> None:
    """Raise UserError for a width at which a row's products round according to its place."""
    width = model.config.width // model.num_ranks
    weight = model.embedding.weight
    is_safe = packs(weight) and weight.dtype == torch.float32
    is_safe &= all(past.streams == 1 for past in remembered(model.mixers, PastInputs))
    if width % 16 and not is_safe:
        raise UserError(
            "batch_invariant",
            message=f"batch_invariant is not allowed for width={width}: for the full form, and "
            "where weights are not packed, the width must be a multiple of 16",
        )


def _layers(weight: Tensor, weights: EngineWeights, usual_rows: int) -> _Layers | None:
    """Return the modules for weights like this one; None: those of the model. Raises UserError."""
    if weights == "float":
        if packs(weight):
            mlp = partial(PackedGatedMLP, usual_rows=usual_rows)
            return _Layers(mlp, partial(PackedLinear, usual_rows=usual_rows))
        return _Layers(kernel_mlp, norm=KernelRMSNorm) if uses_triton(weight) else None
    if weights == "fp8":
        _require_fp8(weight.device)
    if _runs_narrow(weight):
        linear = partial(_narrow_linear, weights=weights)
        return _Layers(partial(narrow_mlp, weights=weights), linear, KernelRMSNorm)
    if not _runs_int8(weight):
        fix = "8 bits run on CUDA, and on x86 processors with a torch that was built with FBGEMM"
        raise UserError("weights", weights, "float", fix)
    return _Layers(Int8GatedMLP, Int8Linear)


def _runs_narrow(weight: Tensor) -> bool:
    """Return whether the kernel for weights of 8 bits, or its twin, runs with this tensor."""
    return weight.is_cuda or uses_triton(weight)


def _runs_int8(weight: Tensor) -> bool:
    return _runs_narrow(weight) or (weight.device.type == "cpu" and has_int8())


def _require_fp8(device: torch.device) -> None:
    """Raise UserError for a device without floats of 8 bits."""
    if device.type != "cuda":
        fix = "fp8 runs on NVIDIA GPUs of compute capability 8.9 or above, such as L4 and H100"
        raise UserError("weights", "fp8", f"int8 or float on {device.type}", fix)
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        own = ".".join(map(str, capability))
        fix = f"fp8 needs compute capability 8.9 or above, and {name} has {own}"
        raise UserError("weights", "fp8", "int8 or float on this GPU", fix)


def _narrow_linear(weight: Tensor | Quantized, weights: ByteWeights) -> NarrowLinear:
    return NarrowLinear(quantize(weight, weights) if isinstance(weight, Tensor) else weight)


def _replace(module: nn.Module, replaced: Callable[[nn.Module], nn.Module]) -> None:
    """Replace the modules in a module, except within those that are new."""
    for name, child in module.named_children():
        new = replaced(child)
        if new is child:
            _replace(child, replaced)
        else:
            setattr(module, name, new)


def _replaced(module: nn.Module, layers: _Layers, weights: EngineWeights) -> nn.Module:
    """Return `module`, or the one to use instead."""
    if isinstance(module, GatedMLP) and not is_adapted(module):
        return layers.mlp(module)
    if isinstance(module, RMSNorm) and layers.norm is not None:
        return layers.norm(module)
    if layers.linear is None:
        return module
    if isinstance(module, nn.Linear):
        return _with_bias(layers.linear(module.weight), module.bias)
    if isinstance(module, QuantizedLinear):
        assert weights != "float", "they have been replaced"
        return _with_bias(layers.linear(quantized(module, weights)), module.bias)
    return module


def _with_bias(product: nn.Module, bias: nn.Parameter | None) -> nn.Module:
    return product if bias is None else BiasedProduct(product, bias)


class BiasedProduct(nn.Module):
    """A product `[.., in] -> [.., out]` and the bias that is added to it."""

    def __init__(self, product: nn.Module, bias: nn.Parameter) -> None:
        super().__init__()
        self.product, self.bias = product, bias

    def forward(self, x: Tensor) -> Tensor:
        biased: Tensor = self.product(x) + self.bias
        return biased


def _float(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return `module`, or one with weights of `dtype` in place of weights of 8 bits."""
    if not isinstance(module, QuantizedLinear):
        return module
    with torch.device("meta"):
        outputs, inputs = module.values.shape
        linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight = nn.Parameter(module.weight_in(dtype), requires_grad=False)
    linear.register_parameter("bias", module.bias)
    return linear
