"""Measurements that the parts of the check share: of the memory, of steps, and of energy."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.timing import synchronize, timed
from stu.config import ModelConfig
from stu.model import FlashSTU

Figures = dict[str, Any]
Measures = Iterator[tuple[str, Callable[[], Figures]]]
"""Names of settings, and the functions that measure them."""
READ_REPEATS = 9
WARM_CALLS = 3
"""Calls before a capture, which compile kernels and allocate workspaces."""


def read_bandwidth(device: str, num_bytes: int) -> float:
    """Return the bytes per second at which the memory is read, by the faster of two ways."""
    numbers = torch.ones(num_bytes // 4, device=device)
    return num_bytes / min(
        statistics.median([timed(read) for _ in range(READ_REPEATS)][1:])  # the first warms up
        for read in (numbers.max, numbers.sum)
    )


def decoding_dtype(device: str) -> torch.dtype:
    """Return the type of weights that decode."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def make_model(config: ModelConfig, device: str) -> FlashSTU:
    """Return a model that decodes, with random weights made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        return FlashSTU(config).to(decoding_dtype(device)).eval()


def release_memory() -> None:
    """Return the memory of what is not referenced any more to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step_times(step: Callable[[], object], count: int, waits: bool) -> Figures:
    """Return milliseconds of consecutive steps: the median, the mean, and the largest over the
    median. waits: Wait for the GPU after each step; without it, steps wait for what they need."""
    times = []
    synchronize()
    first = start = time.perf_counter()
    for _ in range(count):
        step()
        if waits:
            synchronize()
        now = time.perf_counter()
        times.append(1e3 * (now - start))
        start = now
    synchronize()
    median = statistics.median(times)
    return {
        "step_ms": median,
        "mean_step_ms": 1e3 * (time.perf_counter() - first) / count,
        "largest_over_median": max(times) / median,
    }


def energy(call: Callable[[], object], seconds: float) -> Figures:
    """Return joules of a call, and watts meanwhile, over `seconds` of calls; nothing without an
    NVIDIA GPU, and the reason where its driver does not tell."""
    if seconds <= 0 or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    try:
        import pynvml  # type: ignore[import-not-found]
    except ImportError as error:
        return {"energy_error": str(error)}
    try:
        return counted_energy(pynvml, call, seconds)
    except pynvml.NVMLError as error:
        return {"energy_error": str(error)}


def counted_energy(pynvml: Any, call: Callable[[], object], seconds: float) -> Figures:
    """Return the figures of `energy` by the counter of the driver. Raises NVMLError."""
    pynvml.nvmlInit()
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{device.uuid}")
    synchronize()
    before, start, count = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), time.monotonic(), 0
    while time.monotonic() < start + seconds:
        call()
        count += 1
    synchronize()
    joules = (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3
    return {"joules_per_step": joules / count, "watts": joules / (time.monotonic() - start)}


def warmed(step: Callable[[], None]) -> Callable[[], None]:
    """Return the step, after a few of it."""
    for _ in range(WARM_CALLS):
        step()
    return step


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of the step; on a CPU the step itself."""
    if not torch.cuda.is_available():
        return warmed(step)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warmed(step)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # whose workspaces are there
        step()
    return warmed(graph.replay)
