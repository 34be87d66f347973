"""`benchmarks profile`: what decoding's long convolutions spend their time on, by torch's profiler.

In the cache's `step` and `advance`, on the CPU: in the middle of each fifth of a run, and in one
flush of each size, each as often as it occurs (`benchmarks.samples`). `convolution_ms` is measured
without the profiler, `profiled_ms` with it, which takes time at each operation. What the cost model
says of the same (`benchmarks.rates`) stands beside it, its operations counted here.
"""

import argparse
import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from tqdm import tqdm

from benchmarks import heap
from benchmarks.decode import of_cache
from benchmarks.decode_engine import VOCAB_SIZE
from benchmarks.decode_subjects import EngineSubject
from benchmarks.machine import describe
from benchmarks.model import CONVOLUTION
from benchmarks.operations import with_parents
from benchmarks.rates import mean_rates, measured_rates, step_parts
from benchmarks.samples import Sample, sampled
from stu.config import ModelConfig
from stu.model import FlashSTU

GROUPS = {
    "products": "of matrices, and direct sums that are written as such",
    "ffts": "there and back",
    "sums": "multiply-adds of vectors and spectra, element by element",
    "copies": "copies, fills, gathers, changes of dtype",
    "others": "all other operations, views mostly",
    "python": "outside of any operation",
}
"""Each moment is counted once."""
FUNCTIONS = {
    "products": {"bmm", "baddbmm", "baddbmm_", "mm", "addmm", "mv", "dot"},
    "ffts": {"fft_rfft", "fft_irfft"},
    "sums": {"mul", "mul_", "addcmul_", "add", "add_", "sum"},
    "copies": {"copy_", "clone", "_to_copy", "index", "cat", "stack", "constant_pad_nd"}
    | {"zero_", "fill_", "zeros", "new_zeros", "empty", "empty_like", "index_put_"},
}


@heap.kept()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every cache and batch."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        width=args.width,
        num_layers=args.layers,
        layout="stu",
        mlp_ratio=4,
        max_seq_len=args.prompt_tokens + args.new_tokens,
    )
    model = FlashSTU(config).eval()
    settings = [(batch, cache) for batch in args.batch for cache in args.caches]
    runs = [
        profiled_run(model, cache, batch, args)
        for batch, cache in tqdm(settings, unit=" caches", smoothing=0)
    ]
    return {"machine": describe(), "parts": GROUPS, "runs": runs}


def profiled_run(
    model: FlashSTU, cache: str, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One cache's figures: means of all steps of a run."""
    candidate = of_cache(model, cache, batch, args.new_tokens, args)
    gc.collect()  # the cache before this one, of gigabytes
    heap.make_room(candidate.setting["cache_bytes"])
    subject, costs = candidate.begin()
    assert isinstance(subject, EngineSubject)
    gc.collect()
    gc.freeze()  # or a step in a hundred waits for a collection of all that was ever imported
    for _ in range(subject.warm_up_steps):
        subject.step()
    rates = [measured_rates(batch)]
    plain = sampled(subject, args.new_tokens)
    rates.append(measured_rates(batch))
    found = sampled(ProfiledSubject(subject), args.new_tokens)
    gc.unfreeze()
    run = candidate.setting | costs.report(4 * model.num_parameters(), batch)
    run["operations_per_step"] = mean(found, "operations")
    predicted = step_parts(run, mean_rates(rates))
    return run | {
        "rates": asdict(mean_rates(rates)),
        "convolution_ms": mean(plain, "convolution"),
        "of_flushes_ms": mean([its for its in plain if its.does], "convolution", args.new_tokens),
        "profiled_ms": mean(found, "convolution"),
        "parts_ms": {name: mean(found, name) for name in GROUPS},
        "predicted_ms": {name: 1e3 * predicted[name] for name in [*CONVOLUTION, "operations"]},
    }


def mean(samples: list[Sample], name: str, num_steps: float = 0.0) -> float:
    """Of one figure, over as many steps as the samples stand for or as are given."""
    total = sum(sample.weight * sample.figures[name] for sample in samples)
    return total / (num_steps or sum(sample.weight for sample in samples))


class ProfiledSubject:
    """The same, whose steps tell what their convolutions do besides how long they take."""

    warm_up_steps = 0

    def __init__(self, subject: EngineSubject) -> None:
        self._subject = subject
        self._found = Counter[str]()
        self.seek, self.prepare_flushes = subject.seek, subject.prepare_flushes
        self.flushes = subject.flushes
        for method in ("step", "advance"):
            call = getattr(subject._cache, method)
            setattr(subject._cache, method, self._profiled(call))

    def step(self) -> dict[str, float]:
        self._found.clear()
        figures = self._subject.step()
        found = {name: self._found[name] for name in (*FUNCTIONS, "others", "operations")}
        in_operations = sum(found[name] for name in (*FUNCTIONS, "others"))
        return figures | found | {"python": figures["convolution"] - in_operations}

    def _profiled(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def profiled_call(*args: Any) -> Any:
            with torch_profile(activities=[ProfilerActivity.CPU]) as profiler:
                result = call(*args)
            for event in profiler.events() or []:
                self._found[part_of(event)] += event.self_cpu_time_total / 1e3
                self._found["operations"] += not event.cpu_children
            return result

        return profiled_call


def part_of(event: FunctionEvent) -> str:
    """Of `FUNCTIONS`, the part of the outermost one that it belongs to."""
    part = "others"
    for at in with_parents(event):
        name = at.name.removeprefix("aten::")
        part = next((its for its, functions in FUNCTIONS.items() if name in functions), part)
    return part
