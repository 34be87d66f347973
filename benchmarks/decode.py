"""`stu-bench decode`: the engine with its paged convolution cache, a naive one and an epoched one.

All requests of a batch start together after prompts of 512 tokens. A run of 16,384 tokens by direct
sums takes hours, so steps are timed at positions spread over the run, where the caches are set to
as if the run had come there, and so is a flush of each tile size or epoch length; a run's time is
their sum, each weighted by how often it occurs. `--whole` runs every step of the paged cache
instead.

Of a step, `convolution` is the time in the cache's `step` and `advance`, `outside` what is spent
outside the runner: scheduler, sampling, text. Peers are `stu.futurefill.Naive`, which reads even
lags only and makes no temporaries, and `stu.futurefill.Epoched`.
"""

import argparse
import functools
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.decode_plot import plot
from benchmarks.lockstep_cache import LockstepCache
from benchmarks.machine import copy_gb_per_s, describe
from serve.config import EngineConfig
from serve.engine import Engine
from serve.pages import PagePool
from serve.request import Request
from serve.runner import Runner
from stu.config import ModelConfig
from stu.futurefill import Epoched, Naive
from stu.model import FlashSTU
from stu.tokenizer import Tokenizer, train_bpe

VOCAB_SIZE, WIDTH, PROMPT_TOKENS = 4096, 512, 512
POSITIONS, STEPS_AT_EACH, FLUSHES_OF_EACH = 10, 5, 3
PEERS = {"naive": Naive, "epoched": Epoched}
PARTS = ["step", "convolution", "outside"]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every combination of the settings, and each peer's ratio to the paged cache."""
    result: dict[str, Any] = {"machine": describe(), "copy_gb_per_s": copy_gb_per_s(), "runs": []}
    for layout, mlp_ratio, new_tokens in itertools.product(
        args.layout, args.mlp_ratio, args.new_tokens
    ):
        torch.manual_seed(0)
        config = ModelConfig(
            vocab_size=VOCAB_SIZE,
            width=WIDTH,
            layout=layout,
            mlp_ratio=mlp_ratio,
            max_seq_len=PROMPT_TOKENS + new_tokens,
        )
        model = FlashSTU(config).eval()
        for batch in args.batch:
            runs = [
                run
                for cache in args.caches
                for run in run_cache(model, cache, batch, new_tokens, args)
            ]
            result["runs"] += compared(runs)
            if args.output:
                args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(result, args.plot)
    return result


def run_cache(
    model: FlashSTU, cache_name: str, batch: int, new_tokens: int, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """For each number of threads, milliseconds of a step on average, and what they are spent on."""
    gc.collect()  # the engine before this one, of many gigabytes
    engine, cache = make_engine(model, cache_name, batch, new_tokens, args.page_len)
    torch.set_num_threads(max(args.threads))
    for seed in range(batch):
        engine.add(Request([seed + 1] * PROMPT_TOKENS, new_tokens))
    while engine.stats().new_tokens < batch:
        engine.step()
    assert engine.stats().running == batch, "the caches have too little room"
    clock = Clock(engine, cache)
    gc.collect()
    gc.freeze()  # or a step in a hundred waits for a collection of all that was ever imported
    for threads in args.threads:
        torch.set_num_threads(threads)
        # A page, and what a page's steps keep for the next.
        for _ in range(min(2 * args.page_len, new_tokens // 8)):
            engine.step()
        if args.whole:
            samples = [(1.0, "", clock.step()) for _ in range(new_tokens - 8)]
        else:
            samples = sampled(clock, cache, new_tokens)
        shape = model.config
        setting = {
            "layout": shape.layout,
            "mlp_ratio": shape.mlp_ratio,
            "new_tokens": new_tokens,
            "batch": batch,
            "threads": threads,
            "cache": cache_name,
        }
        run = setting | summary(samples) | bandwidth(model, samples)
        if cache_name == "naive":
            run |= naive_bandwidth(model, run)
        print({name: shown(value) for name, value in run.items()}, file=sys.stderr, flush=True)
        yield run
    gc.unfreeze()


def sampled(
    clock: "Clock", cache: Any, new_tokens: int
) -> list[tuple[float, str, dict[str, float]]]:
    """Steps, each with how many of a run's it stands for, and what it does besides a step."""
    flushes = []
    for what, position, count in cache_flushes(cache, new_tokens):
        each = []
        for _ in range(FLUSHES_OF_EACH):
            seek(cache, position - 1)
            each.append(clock.step())
        flushes.append((float(count), what, medians(each)))
    num_plain = new_tokens - sum(count for count, _, _ in flushes)
    steps = []
    spread = range(0, max(1, new_tokens - 64), max(1, new_tokens // POSITIONS))
    for number, position in enumerate(spread):
        # All over a page of 32 positions, but no page ends within the next steps.
        seek(cache, position - position % 64 + 5 * number % 26)
        clock.step()
        median = medians([clock.step() for _ in range(STEPS_AT_EACH)])
        steps.append((num_plain / len(spread), "", median | {"position": position}))
    return steps + flushes


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    return {part: statistics.median(step[part] for step in steps) for part in PARTS}


def summary(samples: list[tuple[float, str, dict[str, float]]]) -> dict[str, Any]:
    """Means, quantiles and the largest step of a run."""
    total = sum(weight for weight, _, _ in samples)
    result: dict[str, Any] = {
        f"{part}_ms": sum(weight * step[part] for weight, _, step in samples) / total
        for part in PARTS
    }
    for part in ("convolution", "outside"):
        result[f"{part}_share"] = result[f"{part}_ms"] / result["step_ms"]
    ordered = sorted(samples, key=lambda its: its[2]["step"])
    for name, share in {"median": 0.5, "p99": 0.99}.items():
        reached = itertools.accumulate(weight for weight, _, _ in ordered)
        place = next(i for i, sofar in enumerate(reached) if sofar >= share * total)
        result[f"{name}_step_ms"] = ordered[place][2]["step"]
    result["p99_over_median"] = result["p99_step_ms"] / result["median_step_ms"]
    result["largest_step_ms"] = ordered[-1][2]["step"]
    result["largest_step_does"] = ordered[-1][1] or "nothing besides"
    plain = [step for _, what, step in samples if not what and "position" in step]
    result["step_ms_by_position"] = {int(its["position"]): its["step"] for its in plain}
    result["step_ms_by_flush"] = {what: step["step"] for _, what, step in samples if what}
    return result


def bandwidth(
    model: FlashSTU, samples: list[tuple[float, str, dict[str, float]]]
) -> dict[str, float]:
    """How fast the weights go through, were each read from memory once a step."""
    num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    steps = [step["step"] - step["convolution"] for _, _, step in samples]
    return {"weights_gb_per_s": num_bytes / 1e6 / statistics.median(steps)}


def naive_bandwidth(model: FlashSTU, run: dict[str, Any]) -> dict[str, float]:
    """How fast direct sums read the past and the taps, on average over the run."""
    columns = (PROMPT_TOKENS + run["new_tokens"] / 2) / 2  # of even lags
    num_bytes = columns * (run["batch"] + 1) * WIDTH * 4 * len(model.config.stu_layers)
    return {"cache_gb_per_s": num_bytes / 1e6 / run["convolution_ms"]}


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every peer's time over the paged cache's, in the same setting."""
    paged = {run["threads"]: run for run in runs if run["cache"] == "paged"}
    for run in runs:
        if run["cache"] != "paged" and run["threads"] in paged:
            reference = paged[run["threads"]]
            for part in ("step", "convolution"):
                run[f"{part}_over_paged"] = run[f"{part}_ms"] / reference[f"{part}_ms"]
    return runs


def make_engine(
    model: FlashSTU, cache_name: str, batch: int, new_tokens: int, page_len: int
) -> tuple[Engine, Any]:
    """An engine whose convolutions are remembered by the cache of that name."""
    # Room for all, whichever share attention gets.
    num_pages = batch * (new_tokens // page_len + 100)
    page_bytes = model.config.num_layers * page_len * WIDTH * 4
    config = EngineConfig(
        cache_gib=1.5 * num_pages * page_bytes / 2**30 + 0.1,
        page_len=page_len,
        max_running=batch,
        prompt_tokens_per_step=PROMPT_TOKENS * batch,
    )
    engine = Engine(model, tokenizer(), config)
    if cache_name == "paged":
        return engine, engine._caches.convolution
    # The peer's memory is its own, and may be all there is.
    no_pages = PagePool(2, (1,)), engine._caches.pools[1]
    object.__setattr__(engine._caches, "pools", no_pages)
    object.__setattr__(engine._caches, "convolution", None)
    engine._runner = engine._scheduler._needed = None  # type: ignore[assignment]
    gc.collect()
    taps, lag_step = model.convolution_taps()
    peer = PEERS[cache_name](taps.float(), batch, new_tokens, lag_step)
    if isinstance(peer, Naive):
        # Half of it is room for longer prompts: calloc's memory takes none until it is written to.
        peer._inputs = torch.from_numpy(np.zeros(peer._inputs.shape, np.float32))
    cache = LockstepCache(peer)
    runner = Runner(model, cache, engine._caches.attention)  # type: ignore[arg-type]
    free = engine._caches.free
    engine._runner, engine._scheduler._needed = runner, runner.needed
    object.__setattr__(engine._caches, "convolution", cache)
    engine._scheduler._capacity = engine._caches.capacity._replace(convolution=2**40)
    object.__setattr__(engine._caches, "free", lambda: free()._replace(convolution=2**40))
    return engine, cache


@functools.cache
def tokenizer() -> Tokenizer:
    """Of the standard library's own modules: text is decoded as it would be."""
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = [module.read_text(encoding="utf-8") for module in modules]
    with tempfile.TemporaryDirectory() as folder:
        return train_bpe(texts, VOCAB_SIZE, Path(folder) / "tokenizer.model")


def seek(cache: Any, position: int) -> None:
    """Set every row of the batch to so many new tokens."""
    if isinstance(cache, LockstepCache):
        cache.seek(position)
        return
    done = position // cache._page_len
    cache._pool.free = lambda owner, pages: None  # it may go back
    tiles = cache._tiles
    for sequence in cache._sequences.values():
        cache._time = cache._starts[0] + position  # of all: they began together
        sequence.tiles, sequence.pending, first = [], {}, 0
        for level in (i for i in reversed(range(done.bit_length())) if done & 2**i):
            num_held = 2**level if level < tiles._smallest_summary else tiles._summary_pages
            sequence.tiles.append(sequence.pages[first : first + num_held])
            first += 2**level
        for level in range(tiles._smallest_summary + 1, len(tiles._levels)):
            if done >= 2**level and done % 2**level < 2 ** (level - 1):
                first = tiles._summary_pages * level  # any that no tile has
                sequence.pending[level] = sequence.pages[first : first + tiles._summary_pages]


def cache_flushes(cache: Any, new_tokens: int) -> list[tuple[str, int, int]]:
    """What flushes do, a position at which each occurs, and how many it stands for."""
    if isinstance(cache, LockstepCache):
        return cache.sampled_flushes()
    page_len = cache._page_len
    num_pages = -(-(new_tokens - 1) // page_len)
    sizes = [2**i for i in range(num_pages.bit_length()) if 2**i < num_pages]
    return [
        (
            f"a flush of {size * page_len} positions",
            size * page_len,
            len(range(size, num_pages, 2 * size)),
        )
        for size in sizes
    ]


def shown(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


class Clock:
    """Milliseconds of a step, of the convolution in it, and outside the runner."""

    def __init__(self, engine: Engine, cache: Any) -> None:
        self._engine = engine
        self._spent = {"convolution": 0.0, "runner": 0.0}
        for owner, method, part in (
            (cache, "step", "convolution"),
            (cache, "advance", "convolution"),
            (engine._runner, "decode", "runner"),
        ):
            setattr(owner, method, self._timed(getattr(owner, method), part))

    def _timed(self, call: Any, part: str) -> Any:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = call(*args)
            self._spent[part] += time.perf_counter() - start
            return result

        return timed

    def step(self) -> dict[str, float]:
        """One step of the engine."""
        self._spent.update(convolution=0.0, runner=0.0)
        start = time.perf_counter()
        self._engine.step()
        total = time.perf_counter() - start
        return {
            "step": 1e3 * total,
            "convolution": 1e3 * self._spent["convolution"],
            "outside": 1e3 * (total - self._spent["runner"]),
        }
