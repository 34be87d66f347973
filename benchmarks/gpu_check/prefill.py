"""Prefill of one long prompt by the engine, and by a Llama-like model of equal size."""

import statistics
from functools import partial

from benchmarks.gpu_check import peer
from benchmarks.gpu_check.engines import make_engine, make_request
from benchmarks.gpu_check.measuring import Figures, Measures, make_model, release_memory
from benchmarks.gpu_check.sizes import Sizes
from benchmarks.timing import timed
from serve.engine.engine import Engine
from serve.request import Request
from stu.config import ModelConfig


def measures(device: str, sizes: Sizes) -> Measures:
    """Yield each model and its peer."""
    for name, config in sizes.models.items():
        yield name, partial(prefill, config, device, sizes.prompt)
        release_memory()
        yield f"peer of {name}", partial(peer.prefill, config, device, sizes.prompt)
        release_memory()


def prefill(config: ModelConfig, device: str, prompt_tokens: int) -> Figures:
    """Return the seconds from a request to its first token."""
    model = make_model(config, device)
    engine = make_engine(model, 1)
    requests = [
        make_request(model, prompt_tokens, 1, seed) for seed in range(1 + peer.PREFILL_REPEATS)
    ]
    first, *others = (timed(partial(complete, engine, request)) for request in requests)
    seconds = statistics.median(others)
    return {
        "prefill_seconds": seconds,
        "first_seconds": first,
        "tokens_per_second": prompt_tokens / seconds,
    }


def complete(engine: Engine, request: Request) -> None:
    """Step until a request has ended."""
    engine.add(request)
    while engine.has_work:
        engine.step()
