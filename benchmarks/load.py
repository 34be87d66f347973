"""`stu-bench load`: a server under many streaming clients, and the engine of it alone.

A model of D = 512 and 8 layers is served by `stu-serve` as a process, and the same requests go
through an engine in this process first, without HTTP. Closed loop: so many clients, each of which
sends its next request when its last one ends. Open loop: requests come at random moments (Poisson),
at a share of what the closed loop got through, however long the others take. Figures have vLLM's
names: time to first token (ttft), time per output token after the first (tpot), between two pieces
(itl), in milliseconds. Goodput counts the requests that kept within both goals.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch

from benchmarks.decode import VOCAB_SIZE, WIDTH, tokenizer
from benchmarks.machine import describe
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import Request
from stu.checkpoint import load_model, load_tokenizer, save_model
from stu.config import ModelConfig
from stu.model import FlashSTU

MAX_RUNNING, CACHE_GIB, PROMPT_TOKENS = 64, 2.0, 64
OPEN_SHARE = 0.7
"""Of the closed loop's requests a second."""
TTFT_GOAL_MS, TPOT_GOAL_MS = 1000.0, 200.0


@dataclass
class Timed:
    """One request, by the clock."""

    sent: float
    pieces: list[float] = field(default_factory=list)
    """When each piece of text came."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The engine alone, and the server in both loops."""
    result: dict[str, Any] = {"machine": describe(), "runs": []}
    for threads in args.threads:
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as folder:
            model = save(Path(folder) / "model", args.new_tokens)
            alone = engine_alone(model, args)
            with serving(model, threads) as (url, seconds_to_ready, process):
                closed = asyncio.run(load(url, args, None))
                rate = OPEN_SHARE * closed["request_throughput"]
                opened = asyncio.run(load(url, args, rate))
                resident = resident_mib(process)
        overhead = 1 - closed["output_throughput"] / alone
        result["runs"].append(
            {
                "threads": threads,
                "clients": args.clients,
                "new_tokens": args.new_tokens,
                "engine_only_tokens_per_second": alone,
                "closed_loop": closed,
                "overhead_share": overhead,
                "open_loop": {"rate": rate, **opened},
                "seconds_to_ready": seconds_to_ready,
                "resident_mib": resident,
            }
        )
    return result


def save(path: Path, new_tokens: int) -> Path:
    """The model directory."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=VOCAB_SIZE, width=WIDTH, layout="stu", max_seq_len=PROMPT_TOKENS + new_tokens + 1
    )
    save_model(path, FlashSTU(config), tokenizer())
    return path


def prompt(number: int) -> list[int]:
    """Of request `number`."""
    rng = random.Random(number)
    return [rng.randrange(300, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)]


def engine_alone(path: Path, args: argparse.Namespace) -> float:
    """New tokens a second of as many requests at once, each followed by the next."""
    config = EngineConfig(cache_gib=CACHE_GIB, max_running=MAX_RUNNING)
    engine = Engine(load_model(path), load_tokenizer(path), config)
    began, number = time.perf_counter(), 0
    while engine.has_work or number < args.requests:
        stats = engine.stats()
        for _ in range(min(args.clients - stats.running - stats.waiting, args.requests - number)):
            engine.add(Request(prompt(number), args.new_tokens))
            number += 1
        engine.step()
    return engine.stats().new_tokens / (time.perf_counter() - began)


@contextmanager
def serving(path: Path, threads: int) -> Iterator[tuple[str, float, int]]:
    """A server's address, the seconds until it took requests, and its process."""
    command = [sys.executable, "-m", "serve.server", str(path), "--port", "0"]
    command += ["--cache-gib", str(CACHE_GIB), "--max-running", str(MAX_RUNNING)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stderr is not None
        url = ""
        while not url:
            line = server.stderr.readline()
            assert line, "the server did not start"
            if "listening on " in line:
                url = json.loads(line)["message"].split()[-1]
        ready = time.perf_counter() - began
        drained = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        yield url, ready, server.pid
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        drained.wait(60)
    finally:
        server.kill()


async def load(url: str, args: argparse.Namespace, rate: float | None) -> dict[str, Any]:
    """All requests, by so many clients, or at `rate` a second."""
    numbers, timed = iter(range(args.requests)), []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector) as session:
        began = time.perf_counter()

        async def client() -> None:
            for number in numbers:
                timed.append(await stream(session, number, args.new_tokens))

        if rate is None:
            await asyncio.gather(*[client() for _ in range(args.clients)])
        else:
            rng, tasks = random.Random(0), []
            for number in numbers:
                tasks.append(asyncio.ensure_future(stream(session, number, args.new_tokens)))
                await asyncio.sleep(rng.expovariate(rate))
            timed = await asyncio.gather(*tasks)
        seconds = time.perf_counter() - began
    return summary(timed, seconds, args.new_tokens)


async def stream(session: aiohttp.ClientSession, number: int, new_tokens: int) -> Timed:
    """One request, read to its end."""
    body = {"prompt": prompt(number), "max_tokens": new_tokens, "temperature": 0}
    body |= {"stream": True, "stop_at_eos": False}
    timed, is_done = Timed(time.perf_counter()), False
    async with session.post("/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                timed.pieces.append(time.perf_counter())
            is_done |= line.startswith(b"data: [DONE]")
    assert is_done, "a stream ended too early"
    return timed


def summary(timed: list[Timed], seconds: float, new_tokens: int) -> dict[str, Any]:
    """vLLM's names."""
    ttft = [1e3 * (its.pieces[0] - its.sent) for its in timed]
    tpot = [1e3 * (its.pieces[-1] - its.pieces[0]) / max(1, new_tokens - 1) for its in timed]
    itl = [
        1e3 * (later - sooner)
        for its in timed
        for sooner, later in zip(its.pieces, its.pieces[1:], strict=False)
    ]
    good = sum(a <= TTFT_GOAL_MS and b <= TPOT_GOAL_MS for a, b in zip(ttft, tpot, strict=True))
    result = {
        "completed": len(timed),
        "duration": seconds,
        "request_throughput": len(timed) / seconds,
        "output_throughput": len(timed) * new_tokens / seconds,
        "request_goodput": good / seconds,
    }
    for name, values in {"ttft": ttft, "tpot": tpot, "itl": itl}.items():
        ordered = sorted(values) or [0.0]
        result |= {
            f"mean_{name}_ms": statistics.fmean(ordered),
            f"p50_{name}_ms": ordered[len(ordered) // 2],
            f"p99_{name}_ms": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
            f"max_{name}_ms": ordered[-1],
        }
    return result


def resident_mib(pid: int) -> float:
    """Of a process and those it started."""
    import psutil

    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(its.memory_info().rss for its in family) / 2**20
