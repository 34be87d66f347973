"""`python -m benchmarks load`: a server under many streaming clients, and the engine of it alone.

A model of D = 512 and 8 layers is served by `stu-serve` as a process, and the same requests go
through an engine in this process first, without HTTP. Closed loop: so many clients, each of which
sends its next request when its last one ends. Open loop: requests come at random moments (Poisson),
at a share of what the closed loop got through, however long the others take. Figures have vLLM's
names: time to first token (ttft), time per output token after the first (tpot), between two pieces
(itl), in milliseconds. Goodput counts the requests that kept within both goals.

Short prompts beside so many running streams: how many steps of the engine end between sending one
and its first byte. One step runs when it comes, the next takes it in.
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

from benchmarks.decode_engine import VOCAB_SIZE, tokenizer
from benchmarks.machine import describe
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.request import Request
from serve.sampling_params import SamplingParams
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.model_dir import load_model, load_tokenizer, save_model

WIDTH = 512
CACHE_GIB, PROMPT_TOKENS, SHORT_PROMPT_TOKENS, NUM_SHORT = 2.0, 64, 8, 20
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
            with serving(model, threads, args.clients + 1) as (url, seconds_to_ready, process):
                closed = asyncio.run(load(url, args, None))
                rate = OPEN_SHARE * closed["request_throughput"]
                opened = asyncio.run(load(url, args, rate))
                short = asyncio.run(short_prompts(url, args))
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
                "short_prompts": short,
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


async def short_prompts(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """One after the other, while all other clients' streams run."""
    short, steps, waits = prompt(0)[:SHORT_PROMPT_TOKENS], [], []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector) as session:
        streams = [Timed(time.perf_counter()) for _ in range(args.clients)]
        tasks = [
            asyncio.ensure_future(stream(session, prompt(number), args.new_tokens, its))
            for number, its in enumerate(streams)
        ]
        while not all(its.pieces for its in streams):
            await asyncio.sleep(0.01)
        for _ in range(NUM_SHORT):
            its = Timed(time.perf_counter())
            await stream(session, short, 1, its)
            if any(task.done() for task in tasks):
                break  # the others do not all run any more
            # Each of the others gets a piece of each step.
            steps.append(sum(its.sent < piece < its.pieces[0] for piece in streams[0].pieces))
            waits.append(1e3 * (its.pieces[0] - its.sent))
        await asyncio.gather(*tasks)
    assert steps, "the other streams ended too early: give more new tokens"
    return {
        "completed": len(steps),
        "p50_steps_until_first_byte": statistics.median(steps),
        "max_steps_until_first_byte": max(steps),
        "p50_ttft_ms": statistics.median(waits),
        "max_ttft_ms": max(waits),
    }


def engine_alone(path: Path, args: argparse.Namespace) -> float:
    """New tokens a second of as many requests at once, each followed by the next."""
    config = EngineConfig(cache_gib=CACHE_GIB, max_running=args.clients + 1)
    engine = Engine(load_model(path), load_tokenizer(path), config)
    params = SamplingParams(max_new_tokens=args.new_tokens, stop_at_eos=False)
    began, number = time.perf_counter(), 0
    while engine.has_work or number < args.requests:
        stats = engine.stats()
        for _ in range(min(args.clients - stats.running - stats.waiting, args.requests - number)):
            engine.add(Request(prompt(number), params))
            number += 1
        engine.step()
    return engine.stats().new_tokens / (time.perf_counter() - began)


@contextmanager
def serving(path: Path, threads: int, max_running: int) -> Iterator[tuple[str, float, int]]:
    """A server's address, the seconds until it took requests, and its process."""
    command = [sys.executable, "-m", "serve.server.cli", str(path), "--port", "0"]
    command += ["--cache-gib", str(CACHE_GIB), "--max-running", str(max_running)]
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
    timed: list[Timed] = []
    numbers = iter(range(args.requests))
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector) as session:
        began = time.perf_counter()

        async def send(number: int) -> None:
            timed.append(Timed(time.perf_counter()))
            await stream(session, prompt(number), args.new_tokens, timed[-1])

        async def client() -> None:
            for number in numbers:
                await send(number)

        if rate is None:
            await asyncio.gather(*[client() for _ in range(args.clients)])
        else:
            rng, tasks = random.Random(0), []
            for number in numbers:
                tasks.append(asyncio.ensure_future(send(number)))
                await asyncio.sleep(rng.expovariate(rate))
            await asyncio.gather(*tasks)
        seconds = time.perf_counter() - began
    return summary(timed, seconds, args.new_tokens)


async def stream(
    session: aiohttp.ClientSession, tokens: list[int], new_tokens: int, timed: Timed
) -> None:
    """One request, read to its end."""
    body = {"prompt": tokens, "max_tokens": new_tokens, "temperature": 0}
    body |= {"stream": True, "stop_at_eos": False}
    is_done = False
    async with session.post("/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                timed.pieces.append(time.perf_counter())
            is_done |= line.startswith(b"data: [DONE]")
    assert is_done, "a stream ended too early"


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
