"""Training steps on one device in bfloat16: speed, where the time goes, and energy."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_check.measuring import Figures, Measures, energy, release_memory, step_times
from benchmarks.gpu_check.sizes import Sizes, Training
from stu import attention
from stu.config import ModelConfig
from stu.model import FlashSTU
from train.flops import token_flops
from train.gpus import GPUS, known_gpu
from train.loss import next_token_loss
from train.optimizer import OptimizerConfig, adamw, make_optimizer
from train.parallel.config import ParallelConfig, prepare_blocks

CLIP_NORM, PROFILED_STEPS, WARM_STEPS = 1.0, 2, 3
PARTS = {
    "convolution": ("_CausalConvolution", "_CausalConvolutionBackward"),
    "attention": ("_BlockedAttention", "_BlockedAttentionBackward"),
    "loss": ("_NextTokenLoss", "_NextTokenLossBackward"),
    "optimizer": ("Optimizer.step#DeviceAdamW.step",),
}
"""Names under which torch's profiler shows all operations of a part of the step."""
KERNELS = {"attention": ("flex_attention", "flash_fwd", "flash_bwd")}
"""Parts of the names of kernels that belong to no such operation."""


@dataclass(frozen=True)
class Way:
    """A change to how a model trains, which shows what a default is worth."""

    compiles: bool = False
    change: Callable[[], AbstractContextManager[Any]] = nullcontext


WAYS = {
    "defaults": Way(),
    "compiled blocks": Way(compiles=True),
    "attention in blocks": Way(
        change=lambda: patch.object(attention, "KERNEL_ON_CUDA", "blocked torch code")
    ),
    "AdamW not fused": Way(change=lambda: patch.object(adamw, "is_fused", lambda _: False)),
}


def measures(device: str, sizes: Sizes) -> Measures:
    """Yield all models in the first two ways, and the first one in the others."""
    for number, (way_name, way) in enumerate(WAYS.items()):
        for name, training in islice(sizes.training.items(), None if number < 2 else 1):
            measure = partial(train, sizes.models[name], training, way, device, sizes)
            yield f"{name}, {way_name}", measure
            release_memory()
            torch.compiler.reset()


def train(config: ModelConfig, training: Training, way: Way, device: str, sizes: Sizes) -> Figures:
    """Return the figures of a model in training."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with way.change():
        step = make_step(config, training, way.compiles, device, sizes.train_tokens)
        for _ in range(WARM_STEPS):
            step()
        figures = step_times(step, sizes.train_steps, waits=True)
        tokens = training.micro_batch * sizes.train_tokens
        speed = figures["tokens_per_second"] = 1e3 * tokens / figures["step_ms"]
        figures["mfu"] = mfu(config, training, sizes.train_tokens, speed, device)
        if device == "cuda":
            figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if not way.compiles:  # or the parts would have no names
            figures["shares"] = shares(step, device)
        return figures | energy(step, sizes.energy_seconds)


def make_step(
    config: ModelConfig, training: Training, compiles: bool, device: str, num_tokens: int
) -> Callable[[], None]:
    """Return the function that takes a step on random tokens, as stu-train does in bf16-mixed."""
    torch.manual_seed(0)
    with torch.device(device):
        model = FlashSTU(config)
        tokens = torch.randint(config.vocab_size, (training.micro_batch, num_tokens + 1))
    is_compiled = compiles and device == "cuda"  # on a CPU that would take a minute
    prepare_blocks(
        model, ParallelConfig(checkpoint_activations=training.recomputes, compile=is_compiled)
    )
    optimizer = make_optimizer(model, OptimizerConfig())

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
            loss, _ = next_token_loss(hidden, model.embedding.weight, tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def mfu(
    config: ModelConfig, training: Training, num_tokens: int, speed: float, device: str
) -> float | None:
    """Return the share of the GPU's peak in products, as stu-train logs it, or None where the peak
    is not known. speed: Tokens per second."""
    gpu = known_gpu(torch.device(device, 0) if device == "cuda" else torch.device(device))
    if gpu is None:
        return None
    flops = token_flops(config, num_tokens, training.micro_batch, recomputes=False)
    return speed * (flops.dense + flops.attention) / GPUS[gpu].flops


def shares(step: Callable[[], None], device: str) -> dict[str, float]:
    """Return the shares of a step's time on the device by part; the rest is dense."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        for _ in range(PROFILED_STEPS):
            step()
    kind = "device" if device == "cuda" else "cpu"
    averages = profiled.key_averages()
    called = [event for event in averages if not is_kernel(event)]
    kernels = [event for event in averages if is_kernel(event) and not event.is_user_annotation]
    ran = kernels if device == "cuda" else called
    total = sum(getattr(event, f"self_{kind}_time_total") for event in ran)
    found = {}
    for part, names in PARTS.items():
        own = sum(getattr(event, f"{kind}_time_total") for event in called if event.key in names)
        for event in kernels:
            if any(name in event.key for name in KERNELS.get(part, ())):
                own += event.self_device_time_total
        found[part] = own / total
    return found


def is_kernel(event: Any) -> bool:
    """Return whether an event of the profiler ran on a GPU."""
    return "CPU" not in str(event.device_type)
