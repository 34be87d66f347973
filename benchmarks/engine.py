"""Decoding in the engine, with the paged convolution cache, a naive and an epoched one.

    python -m benchmarks.engine --batch 8 --new-tokens 4096 > engine.json

All requests of a batch start together. Steps are timed at positions spread over the run, where the
cache is set to as if the run had come there, and flushes for each tile size or epoch; a run's time
is their sum, weighted by how often each occurs. `convolution` is the time in the cache's `step` and
`advance`, `outside` what is spent outside the runner (scheduler, sampling, text).
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch

from benchmarks.lockstep_cache import LockstepCache
from benchmarks.machine import describe
from serve.cache import ConvolutionCache
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import Request
from serve.runner import Runner
from stu.config import ModelConfig
from stu.futurefill import Epoched, Naive
from stu.model import FlashSTU

VOCAB_SIZE, PROMPT_TOKENS = 4096, 512
POSITIONS, STEPS_AT_EACH = 12, 4


class NoText:
    """A tokenizer for tokens of no meaning."""

    def decode(self, ids: list[int]) -> str:
        return "x" * len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=4096)
    parser.add_argument("--mlp-ratio", type=int, default=4)
    parser.add_argument("--layout", choices=["stu", "hybrid"], default="stu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page-len", type=int, default=EngineConfig().page_len)
    parser.add_argument("--caches", nargs="+", default=["paged", "naive", "epoched"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"machine": describe(), "setting": vars(args), "caches": {}}
    for name in args.caches:
        result["caches"][name] = measure(name, args)
        print(name, result["caches"][name], file=sys.stderr)
    result["copy_gb_per_s"] = copy_bandwidth()
    json.dump(result, sys.stdout, indent=1)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step on average over the run, and what they are spent on."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        layout=args.layout,
        mlp_ratio=args.mlp_ratio,
        max_seq_len=PROMPT_TOKENS + args.new_tokens,
    )
    engine, cache = make_engine(name, FlashSTU(config).eval(), args)
    for seed in range(args.batch):
        engine.add(Request([seed + 1] * PROMPT_TOKENS, args.new_tokens))
    while engine.stats().new_tokens < args.batch:
        engine.step()
    clock = Clock(engine, cache)
    for _ in range(3):
        engine.step()
    steps, flushes = [], {}
    for position in range(4, args.new_tokens - 8, args.new_tokens // POSITIONS):
        position += (-position) % 4 + 1  # never at the end of a page
        seek(cache, position)
        steps += [clock.step() for _ in range(STEPS_AT_EACH)]
    for flush, position, count in flush_positions(cache, args.new_tokens):
        seek(cache, position)
        flushes[flush] = {**clock.step(), "count": count}
    return summary(steps, flushes, args.new_tokens)


def summary(
    steps: list[dict[str, float]], flushes: dict[int, dict[str, float]], new_tokens: int
) -> dict[str, Any]:
    """Means over the run: flush steps count as often as they occur, other steps the rest."""
    num_flushes = sum(flush["count"] for flush in flushes.values())
    plain = new_tokens - num_flushes
    result: dict[str, Any] = {}
    for part in ("step", "convolution", "outside"):
        total = plain * statistics.fmean(step[part] for step in steps)
        total += sum(flush[part] * flush["count"] for flush in flushes.values())
        result[f"{part}_ms"] = total / new_tokens
    result["convolution_share"] = result["convolution_ms"] / result["step_ms"]
    result["outside_share"] = result["outside_ms"] / result["step_ms"]
    result["plain_convolution_ms"] = statistics.median(step["convolution"] for step in steps)
    result["median_step_ms"] = statistics.median(step["step"] for step in steps)
    result["flush_step_ms"] = {size: flush["step"] for size, flush in flushes.items()}
    slowest, left = sorted(flushes.values(), key=lambda its: -its["step"]), new_tokens // 100
    result["p99_step_ms"] = result["median_step_ms"]
    for flush in slowest:
        left -= int(flush["count"])
        if left < 0:
            result["p99_step_ms"] = flush["step"]
            break
    return result


def make_engine(name: str, model: FlashSTU, args: argparse.Namespace) -> tuple[Engine, Any]:
    """An engine whose convolutions are remembered as `name` says."""
    pages_gib = model.config.width * 4 * 8 * args.batch * (args.new_tokens + 1024) / 2**30
    config = EngineConfig(
        cache_gib=pages_gib * 1.5 + 0.5 if name == "paged" else 2.5,
        page_len=args.page_len,
        max_running=args.batch,
        prompt_tokens_per_step=PROMPT_TOKENS * args.batch,
    )
    engine = Engine(model, NoText(), config)  # type: ignore[arg-type]
    if name == "paged":
        return engine, engine._caches.convolution
    form = {"naive": Naive, "epoched": Epoched}[name]
    taps, lag_step = model.convolution_taps()
    cache = LockstepCache(form(taps.float(), args.batch, args.new_tokens, lag_step))
    engine._runner = Runner(model, cache, engine._caches.attention)  # type: ignore[arg-type]
    engine._scheduler._capacity = engine._caches.capacity._replace(convolution=2**40)
    free = engine._caches.free
    engine._scheduler._needed = lambda p, n: engine._runner.needed(p, n)
    object.__setattr__(engine._caches, "free", lambda: free()._replace(convolution=2**40))
    return engine, cache


def seek(cache: Any, position: int) -> None:
    """Set every row of the batch to so many new tokens."""
    if isinstance(cache, LockstepCache):
        cache.seek(position)
    else:
        for sequence in cache._sequences.values():
            sequence.start = cache._time - position


def flush_positions(cache: Any, new_tokens: int) -> list[tuple[int, int, int]]:
    """Sizes of flushes, a position just before each, and how many it stands for."""
    if isinstance(cache, ConvolutionCache):
        page_len = cache._page_len
        num_pages = -(-(new_tokens - 1) // page_len)
        sizes = [2**i for i in range(num_pages.bit_length()) if 2**i < num_pages]
        return [
            (size * page_len, size * page_len - 1, len(range(size, num_pages, 2 * size)))
            for size in sizes
        ]
    return cache.flush_positions(POSITIONS)  # type: ignore[no-any-return]


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


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy too large for the caches, in GB/s."""
    source = torch.ones(2**27)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / statistics.median(seconds) / 1e9


if __name__ == "__main__":
    main()
