"""Weights of 8 bits: what they cost in bits per byte, their products, and decoding steps."""

import math
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_check.decoding import decode, start
from benchmarks.gpu_check.measuring import (
    Figures,
    Measures,
    captured,
    decoding_dtype,
    make_model,
    read_bandwidth,
    release_memory,
)
from benchmarks.gpu_check.sizes import Sizes
from benchmarks.timing import timed
from serve.config import EngineWeights
from serve.engine.engine import Engine
from serve.engine.inference_model import FP8_CAPABILITY, inference_copy, inference_product
from stu.model import FlashSTU
from train.optimizer import OptimizerConfig, make_optimizer

TRAINED_TOKENS, TRAINED_TOGETHER = 512, 32
READ_TOKENS = 256
"""Tokens of a text whose bits are counted: as many rows as the kernel of the products takes."""
REPEATS = 5


def measures(device: str, sizes: Sizes) -> Measures:
    """Yield bits per byte, products of every shape, and steps of the first model."""
    formats = formats_on(device)
    yield "bits per byte", partial(bits_per_byte, device, sizes, formats)
    release_memory()
    bandwidth = read_bandwidth(device, sizes.read_bytes)
    name, config = next(iter(sizes.models.items()))
    hidden = config.mlp_ratio * config.width
    for outputs, inputs in ((config.width, config.width), (2 * hidden, config.width)):
        for rows in sizes.weight_batches:
            measure = partial(product, rows, outputs, inputs, device, sizes, formats, bandwidth)
            yield f"product of {outputs} x {inputs}, {rows} rows", measure
            release_memory()
    for weights in formats[1:]:
        model = make_model(config, device)
        engines: list[Engine] = []  # one, unless it cannot start
        batch = max(sizes.weight_batches)
        yield f"{name}, {weights}, start", partial(start, engines, model, batch, True, weights)
        for batch in sizes.weight_batches if engines else ():
            step = partial(decode, engines[0], model, batch, sizes, bandwidth, weights)
            yield f"{name}, {weights}, batch {batch}", step
            del step
        engines.clear()
        del model
        release_memory()


def formats_on(device: str) -> list[EngineWeights]:
    """Return the formats that the device runs."""
    formats: list[EngineWeights] = ["float", "int8"]
    if device == "cuda" and torch.cuda.get_device_capability() >= FP8_CAPABILITY:
        formats.append("fp8")
    return formats


def product(
    rows: int,
    outputs: int,
    inputs: int,
    device: str,
    sizes: Sizes,
    formats: list[EngineWeights],
    bandwidth: float,
) -> Figures:
    """Return the microseconds of a product by format, and the time over that of reading its
    weights. So many weights take turns that no cache holds them."""
    figures: Figures = {}
    dtype = decoding_dtype(device)
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    count = max(2, sizes.read_bytes // 16 // (outputs * inputs))
    weights = [torch.randn(outputs, inputs, device=device, dtype=dtype) for _ in range(count)]
    for name in formats:
        products = [inference_product(weight, name) for weight in weights]
        run = captured(partial(run_all, products, x))
        seconds = min(timed(run) for _ in range(REPEATS)) / count
        num_bytes = outputs * inputs * (dtype.itemsize if name == "float" else 1)
        figures[f"{name}_us"] = 1e6 * seconds
        figures[f"{name}_times_reading"] = seconds * bandwidth / num_bytes
    return figures


@torch.inference_mode()
def run_all(products: list[Callable[[Tensor], Tensor]], x: Tensor) -> None:
    """Compute all products."""
    for own in products:
        own(x)


def bits_per_byte(device: str, sizes: Sizes, formats: list[EngineWeights]) -> Figures:
    """Return bits per byte of Python's standard library by format, for a model that is trained on
    another part of it for a few seconds."""
    text = library_bytes(sizes.text_bytes).to(device)
    held_out = len(text) // 10
    model = trained_model(text[held_out:], device, sizes)
    figures: Figures = {}
    with torch.inference_mode():
        for weights in formats:
            run = inference_copy(model, weights)
            unembed = inference_product(model.embedding.weight, weights)
            starts = range(0, held_out - READ_TOKENS, held_out // sizes.quality_texts)
            bits = [text_bits(run, unembed, text[at : at + READ_TOKENS + 1]) for at in starts]
            figures[weights] = sum(bits) / len(bits)
    for weights in formats[1:]:
        figures[f"{weights}_increase"] = figures[weights] / figures["float"] - 1
    return figures


def library_bytes(count: int) -> Tensor:
    """Return bytes of the standard library's files as tokens."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[:count]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def trained_model(text: Tensor, device: str, sizes: Sizes) -> FlashSTU:
    """Return a model that has been trained on random parts of a text."""
    torch.manual_seed(0)
    with torch.device(device):
        model = FlashSTU(sizes.text_model)
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=2e-3))
    places = torch.arange(TRAINED_TOKENS + 1, device=device)
    for _ in range(sizes.quality_steps):
        starts = torch.randint(len(text) - TRAINED_TOKENS, (TRAINED_TOGETHER, 1), device=device)
        tokens = text[starts + places]  # [B, T + 1]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.to(decoding_dtype(device)).eval()


def text_bits(model: FlashSTU, unembed: Callable[[Tensor], Tensor], tokens: Tensor) -> float:
    """Return bits per token of `tokens [T + 1]` after the first."""
    logits = unembed(model.hidden(tokens[None, :-1])[0])
    return F.cross_entropy(logits.float(), tokens[1:]).item() / math.log(2)
