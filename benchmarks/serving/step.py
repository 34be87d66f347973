"""`python -m benchmarks step`: what the engine's steps spend beside the model's forward pass.

Times are of the processor, so that other processes count less. `model` is the forward pass,
`caches` what caches do before and after it, as at ends of pages, and `rest` everything else:
scheduling, sampling, text.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal
from unittest.mock import patch

import torch
from jsonargparse.typing import PositiveInt

from benchmarks.gpu_check.engines import filled, make_engine
from benchmarks.machine import describe
from serve.engine.engine import Engine
from stu.config import ModelConfig
from stu.model import FlashSTU

CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
}


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    batch: PositiveInt = 32
    """Sequences that decode together."""
    steps: PositiveInt = 64
    """Steps that are timed, two pages of 32."""
    width: PositiveInt = 1024
    """Width of the model."""
    layers: PositiveInt = 8
    """Blocks of the model."""
    weights: tuple[Literal["float", "int8"], ...] = ("float", "int8")
    """Formats of the weights."""


def measure(options: Options) -> dict[str, Any]:
    """Measure each format of weights with each way to choose tokens."""
    sizes = {"width": options.width, "num_layers": options.layers}
    config = ModelConfig(4096, layout="stu", max_seq_len=512, **sizes)
    torch.manual_seed(0)
    model, runs = FlashSTU(config).eval(), []
    for weights in options.weights:
        engine = make_engine(model, options.batch, weights=weights)
        for choice, params in CHOICES.items():
            with filled(engine, model, options.batch, 16, **params):
                engine.step()
                steps = [timed_parts(engine) for _ in range(options.steps)]
            parts = {name: statistics.mean(step[name] for step in steps) for name in steps[0]}
            run = {"weights": weights, "choice": choice, "batch": options.batch}
            run |= {f"{name}_ms": 1e3 * own for name, own in parts.items()}
            runs.append(run | {"rest_share": parts["rest"] / sum(parts.values())})
    parameters = model.num_parameters()
    return {"machine": describe(), "parameters": parameters, "runs": runs}


def timed_parts(engine: Engine) -> dict[str, float]:
    """Return the processor's seconds of a step by part."""
    runner, seconds = engine._runner, defaultdict[str, float](float)

    def timing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def run(*arguments: Any) -> Any:
            start = time.process_time()
            try:
                return call(*arguments)
            finally:
                seconds[name] += time.process_time() - start

        return run

    with ExitStack() as stack:
        for owner, method, name in (
            (runner._model, "hidden", "model"),
            (runner, "_unembed", "model"),
            (runner, "decode", "decode"),
        ):
            timed = timing(name, getattr(owner, method))
            stack.enter_context(patch.object(owner, method, timed))
        timing("step", engine.step)()
    return {
        "model": seconds["model"],
        "caches": seconds["decode"] - seconds["model"],
        "rest": seconds["step"] - seconds["decode"],
    }
