"""Decoding by the engine: milliseconds of a step, against the time that reading its bytes takes."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu_check.engines import CAPTURES, fill, make_engine, step_bytes
from benchmarks.gpu_check.measuring import (
    Figures,
    Measures,
    energy,
    make_model,
    read_bandwidth,
    release_memory,
    step_times,
)
from benchmarks.gpu_check.sizes import Sizes
from stu.model import FlashSTU

NOT_BUILT = "not built: the engine does not capture its step"
SYNC_BATCH, SYNC_STEPS = 8, 100
"""Rows and steps among which no operation may wait for the GPU."""


def decode_measures(device: str, sizes: Sizes) -> Measures:
    """Yield each model at each batch, with steps called from Python and captured."""
    bandwidth = read_bandwidth(device, sizes.read_bytes)
    yield "memory", lambda: {"read_bytes_per_second": bandwidth}
    for name, config in sizes.models.items():
        model = make_model(config, device)
        for batch in sizes.batches:
            for way in ("captured", "eager"):
                measure = partial(decode, model, batch, way == "captured", sizes, bandwidth)
                yield f"{name}, batch {batch}, {way}", measure
                release_memory()
        del model, measure
        release_memory()


def decode(model: FlashSTU, batch: int, captures: bool, sizes: Sizes, bandwidth: float) -> Figures:
    """Return the figures of a model at a batch."""
    if captures and not CAPTURES:
        return {"not_run": NOT_BUILT}
    engine = make_engine(model, batch, captures)
    fill(engine, model, batch, sizes.context)
    for _ in range(sizes.warm_steps):
        engine.step()
    figures = step_times(engine.step, sizes.steps, waits=False)
    num_bytes = step_bytes(engine, model, batch, sizes.context + sizes.warm_steps)
    figures |= {"step_bytes": num_bytes, "tokens_per_second": 1e3 * batch / figures["mean_step_ms"]}
    figures["times_reading"] = figures["step_ms"] / (1e3 * num_bytes / bandwidth)
    return figures | energy(engine.step, sizes.energy_seconds)


def sync_measures(device: str, sizes: Sizes) -> Measures:
    """Yield captured steps of each model in torch's mode in which waiting for a GPU is an error."""
    for name, config in sizes.models.items():
        yield name, partial(run_unwaiting, partial(make_model, config, device))
        release_memory()


def run_unwaiting(make: Callable[[], FlashSTU]) -> Figures:
    """Return the number of steps that ran without waiting. Raises RuntimeError if one waits."""
    if not CAPTURES:
        return {"not_run": NOT_BUILT}
    model = make()
    engine = make_engine(model, SYNC_BATCH, captures=True)
    fill(engine, model, SYNC_BATCH, prompt_tokens=16)
    modes = torch.cuda.get_sync_debug_mode, torch.cuda.set_sync_debug_mode
    before = modes[0]() if torch.cuda.is_available() else 0
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(SYNC_STEPS):
            engine.step()
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode(before)
    return {"steps": SYNC_STEPS}
