"""Decoding by the engine: milliseconds of a step, against the time that reading its bytes takes."""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from benchmarks.gpu_check.engines import filled, make_engine, step_bytes
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
from serve.config import EngineWeights
from serve.engine.engine import Engine
from serve.engine.runner import Runner
from stu.config import ModelConfig
from stu.model import FlashSTU

Result = TypeVar("Result")
SYNC_BATCH, SYNC_STEPS = 8, 100
"""Rows and steps among which no operation may wait for the GPU."""


def captured_measures(device: str, sizes: Sizes) -> Measures:
    """Yield each model at each batch, with captured steps."""
    return decode_measures(device, sizes, sizes.batches, captures=True)


def eager_measures(device: str, sizes: Sizes) -> Measures:
    """Yield each model at a few batches, with steps that are launched from Python."""
    return decode_measures(device, sizes, sizes.eager_batches, captures=False)


def decode_measures(device: str, sizes: Sizes, batches: Sequence[int], captures: bool) -> Measures:
    """Yield the memory's bandwidth, and each model at each batch."""
    bandwidth = read_bandwidth(device, sizes.read_bytes)
    yield "memory", lambda: {"read_bytes_per_second": bandwidth}
    for name, config in sizes.models.items():
        model = make_model(config, device)
        engines: list[Engine] = []  # one, unless it cannot start
        yield f"{name}, start", partial(start, engines, model, max(batches), captures)
        for batch in batches if engines else ():
            measure = partial(decode, engines[0], model, batch, sizes, bandwidth)
            yield f"{name}, batch {batch}", measure
            del measure
        engines.clear()
        del model
        release_memory()


def start(
    engines: list[Engine],
    model: FlashSTU,
    batch: int,
    captures: bool,
    weights: EngineWeights = "float",
) -> Figures:
    """Append an engine to `engines`, and return the seconds that it takes to start."""
    seconds = timed(lambda: engines.append(make_engine(model, batch, captures, weights)))
    return {"start_seconds": seconds}


def decode(
    engine: Engine,
    model: FlashSTU,
    batch: int,
    sizes: Sizes,
    bandwidth: float,
    weights: EngineWeights = "float",
) -> Figures:
    """Return the figures of a batch."""
    with filled(engine, model, batch, sizes.context):
        for _ in range(sizes.warm_steps):
            engine.step()
        figures = step_times(engine.step, sizes.steps, waits=False)
        figures |= energy(engine.step, sizes.energy_seconds)
    num_bytes = step_bytes(engine, model, batch, sizes.context + sizes.warm_steps, weights)
    figures["times_reading"] = figures["step_ms"] / (1e3 * num_bytes / bandwidth)
    figures["tokens_per_second"] = 1e3 * batch / figures["mean_step_ms"]
    return figures | {"step_bytes": num_bytes}


def sync_measures(device: str, sizes: Sizes) -> Measures:
    """Yield each model's captured steps, and those of the whole engine, in torch's mode in which
    waiting for a GPU is an error."""
    for name, config in sizes.models.items():
        yield f"{name}, model", partial(run_unwaiting, config, device, whole=False)
        yield f"{name}, engine", partial(run_unwaiting, config, device, whole=True)
        release_memory()


def run_unwaiting(config: ModelConfig, device: str, whole: bool) -> Figures:
    """Return the number of steps that ran without waiting. Raises RuntimeError if one waits.

    whole: Count the choice of tokens and their way to the host as well.
    """
    model = make_model(config, device)
    engine = make_engine(model, SYNC_BATCH, captures=True)
    with filled(engine, model, SYNC_BATCH, prompt_tokens=16):
        engine.step()
        with nullcontext() if whole else patch.object(Runner, "decode", unwaiting(Runner.decode)):
            step = unwaiting(engine.step) if whole else engine.step
            for _ in range(SYNC_STEPS):
                step()
    return {"steps": SYNC_STEPS}


def unwaiting(call: Callable[..., Result]) -> Callable[..., Result]:
    """Return `call` in the mode in which waiting for a GPU is an error."""

    @functools.wraps(call)
    def in_mode(*arguments: Any) -> Result:
        if not torch.cuda.is_available():
            return call(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return in_mode
