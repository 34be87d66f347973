"""Decoding by the engine: milliseconds of a step, against the time that reading its bytes takes."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu_check.engines import CAPTURES, filled, make_engine, step_bytes
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
from benchmarks.timing import timed
from serve.engine.engine import Engine
from stu.model import FlashSTU

NOT_BUILT = "not built: the engine does not capture its step"
SYNC_BATCH, SYNC_STEPS = 8, 100
"""Rows and steps among which no operation may wait for the GPU."""


def decode_measures(device: str, sizes: Sizes) -> Measures:
    """Yield each model at each batch, with captured steps and with steps launched from Python."""
    bandwidth = read_bandwidth(device, sizes.read_bytes)
    yield "memory", lambda: {"read_bytes_per_second": bandwidth}
    for name, config in sizes.models.items():
        model = make_model(config, device)
        for way in ("captured", "eager"):
            engines: list[Engine] = []  # one, unless it cannot start
            yield f"{name}, {way}, start", partial(start, engines, model, way, max(sizes.batches))
            for batch in sizes.batches if engines else ():
                measure = partial(decode, engines[0], model, batch, sizes, bandwidth)
                yield f"{name}, {way}, batch {batch}", measure
                del measure
            engines.clear()
            release_memory()
        del model
        release_memory()


def start(engines: list[Engine], model: FlashSTU, way: str, batch: int) -> Figures:
    """Append an engine to `engines`, and return the seconds that it takes to start."""
    if way == "captured" and not CAPTURES:
        return {"not_run": NOT_BUILT}
    return {
        "start_seconds": timed(lambda: engines.append(make_engine(model, batch, way == "captured")))
    }


def decode(engine: Engine, model: FlashSTU, batch: int, sizes: Sizes, bandwidth: float) -> Figures:
    """Return the figures of a batch."""
    with filled(engine, model, batch, sizes.context):
        for _ in range(sizes.warm_steps):
            engine.step()
        figures = step_times(engine.step, sizes.steps, waits=False)
        figures |= energy(engine.step, sizes.energy_seconds)
    num_bytes = step_bytes(engine, model, batch, sizes.context + sizes.warm_steps)
    figures["times_reading"] = figures["step_ms"] / (1e3 * num_bytes / bandwidth)
    figures["tokens_per_second"] = 1e3 * batch / figures["mean_step_ms"]
    return figures | {"step_bytes": num_bytes}


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
    with filled(engine, model, SYNC_BATCH, prompt_tokens=16):
        engine.step()
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(SYNC_STEPS):
                engine.step()
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
    return {"steps": SYNC_STEPS}
