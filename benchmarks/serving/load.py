"""`python -m benchmarks load`: a server under many streaming clients, and its engine alone.

A model of D = 512 and 8 layers is served by stu-serve as a process; in turns with it, the same
requests go through an engine in this process, without HTTP. Closed loop: each client sends a
request when its last one ends. Open loop: requests arrive at random moments (Poisson), at a share
of the closed loop's rate and without waiting for others. Figures have vLLM's names: time to first
token (ttft) and inter-token latency (itl), in milliseconds.
"""

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import torch
from jsonargparse.typing import PositiveInt

from benchmarks.machine import describe
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.request import Request
from serve.sampling_params import SamplingParams
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.model_dir import load_model, load_tokenizer, save_model
from stu.tokenizers.sentence_piece import train_bpe

VOCAB_SIZE, WIDTH = 4096, 512
CACHE_GIB, PROMPT_TOKENS = 2.0, 64
OPEN_SHARE = 0.7
"""Rate of the open loop as a share of the closed loop's."""


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    clients: PositiveInt = 64
    """Clients of the closed loop."""
    requests: PositiveInt = 256
    """Requests of each loop."""
    new_tokens: PositiveInt = 128
    """New tokens of each request."""
    rounds: PositiveInt = 3
    """Rounds, in each of which the engine alone and the closed loop take turns. The one of median
    overhead is shown."""


def measure(options: Options) -> dict[str, Any]:
    """Return the figures of the engine alone, and of the server in both loops."""
    running = options.clients + 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_random_model(path, PROMPT_TOKENS + options.new_tokens + 1)
        config = EngineConfig(cache_gib=CACHE_GIB, max_running=running)
        engine = Engine(load_model(path), load_tokenizer(path), config)
        with serving(path, running) as (url, seconds_to_ready, pid):
            rounds = []
            for turn in range(options.rounds + 1):
                # The first round warms up both, with a request of each client, and is not counted.
                count = options.requests if turn else options.clients
                start = turn * max(options.requests, options.clients)
                work = [(prompt(start + number), options.new_tokens) for number in range(count)]
                alone = engine_alone(engine, work, options.clients)
                closed = asyncio.run(load(url, work, options.clients))
                if turn:
                    rounds.append((1 - closed["output_throughput"] / alone, alone, closed))
            shares = [share for share, *_ in rounds]
            share, alone, closed = rounds[shares.index(statistics.median_low(shares))]
            rate = OPEN_SHARE * closed["request_throughput"]
            opened = asyncio.run(load(url, work, options.clients, rate))
            resident = resident_mib(pid)
    run: dict[str, Any] = {"threads": torch.get_num_threads(), "clients": options.clients}
    run |= {"new_tokens": options.new_tokens, "engine_only_tokens_per_second": alone}
    run |= {"closed_loop": closed, "open_loop": {"rate": rate, **opened}}
    run |= {"overhead_share": share, "overhead_shares": shares}
    run |= {"seconds_to_ready": seconds_to_ready, "resident_mib": resident}
    return {"machine": describe(), "runs": [run]}


def save_random_model(path: Path, max_seq_len: int) -> None:
    """Save a model directory, with a tokenizer of the standard library's modules."""
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = (module.read_text(encoding="utf-8") for module in modules)
    tokenizer = train_bpe(texts, VOCAB_SIZE, path.with_suffix(".tokenizer"))
    config = ModelConfig(vocab_size=VOCAB_SIZE, width=WIDTH, layout="stu", max_seq_len=max_seq_len)
    torch.manual_seed(0)
    save_model(path, FlashSTU(config), tokenizer)


def engine_alone(engine: Engine, work: Sequence[tuple[list[int], int]], clients: int) -> float:
    """Return the new tokens per second of an engine with a request of each client at a time."""
    waiting, new_tokens = iter(work), 0
    start = time.perf_counter()
    while True:
        stats = engine.stats()
        for tokens, count in islice(waiting, clients - stats.running - stats.waiting):
            engine.add(Request(tokens, SamplingParams(max_new_tokens=count, stop_at_eos=False)))
            new_tokens += count
        if not engine.has_work:
            return new_tokens / (time.perf_counter() - start)
        engine.step()


class ServerError(Exception):
    """A server did not start, or did not answer a request to its end."""


@contextmanager
def serving(path: Path, max_running: int, *options: str) -> Iterator[tuple[str, float, int]]:
    """Start a server; yield its address, the seconds until it was ready, and its process id.
    Raises ServerError.

    options: More options of stu-serve.
    """
    command = [sys.executable, "-m", "serve.server.cli", str(path), "--port", "0", *options]
    command += ["--cache-gib", str(CACHE_GIB), "--max-running", str(max_running)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    start = time.perf_counter()
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stderr is not None
        url = ""
        while not url:
            line = server.stderr.readline()
            if not line:
                raise ServerError("the server did not start")
            if "listening on " in line:
                url = json.loads(line)["message"].split()[-1]
        ready = time.perf_counter() - start
        drained = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        yield url, ready, server.pid
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        drained.wait(60)
    finally:
        server.kill()


def resident_mib(pid: int) -> float:
    """Return the resident memory of a server and the processes that it has started."""
    server = psutil.Process(pid)
    family = [server, *server.children(recursive=True)]
    return float(sum(process.memory_info().rss for process in family) / 2**20)


async def load(
    url: str, work: Sequence[tuple[list[int], int]], clients: int, rate: float | None = None
) -> dict[str, Any]:
    """Send requests to a server with OpenAI's API, ours or another, and return the figures.
    Raises ServerError.

    work: Prompt and number of new tokens of each request. clients: Streams at a time, where there
    is no `rate`, in requests per second.
    """
    streams: list[list[float]] = []  # when a request was sent, and when its pieces of text came
    waiting = iter(work)
    # By default, aiohttp opens 100 connections at most.
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
        start = time.perf_counter()

        async def send(tokens: list[int], new_tokens: int) -> None:
            times = [time.perf_counter()]
            streams.append(times)
            await receive(session, tokens, new_tokens, times)

        async def client() -> None:
            for request in waiting:
                await send(*request)

        if rate is None:
            await asyncio.gather(*[client() for _ in range(clients)])
        else:
            draw, tasks = random.Random(0), []
            for request in waiting:
                tasks.append(asyncio.ensure_future(send(*request)))
                await asyncio.sleep(draw.expovariate(rate))
            await asyncio.gather(*tasks)
        seconds = time.perf_counter() - start
    gaps = [[1e3 * (later - sooner) for sooner, later in pairwise(times)] for times in streams]
    return {
        "completed": len(streams),
        "duration": seconds,
        "request_throughput": len(streams) / seconds,
        "output_throughput": sum(new_tokens for _, new_tokens in work) / seconds,
        **quantiles("ttft", [first for first, *_ in gaps]),
        **quantiles("itl", [gap for _, *others in gaps for gap in others]),
    }


async def receive(
    session: aiohttp.ClientSession, tokens: list[int], new_tokens: int, times: list[float]
) -> None:
    """Send one request and read its stream to the end; append the arrival of each piece."""
    body = {"prompt": tokens, "max_tokens": new_tokens, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True}
    is_done = False
    try:
        async with session.post("/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise ServerError(f"HTTP {answer.status}: {await answer.text()}")
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    times.append(time.perf_counter())
                is_done |= line.startswith(b"data: [DONE]")
    except (aiohttp.ClientError, asyncio.TimeoutError) as error:
        raise ServerError(f"{type(error).__name__}: {error}") from error
    if not is_done:
        raise ServerError("a stream ended too early")


def prompt(number: int) -> list[int]:
    """Return the prompt of a request."""
    draw = random.Random(number)
    return [draw.randrange(300, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)]


def quantiles(name: str, values: list[float]) -> dict[str, float]:
    """Return median, 99th percentile and maximum under vLLM's names."""
    found = np.percentile(values, [50, 99, 100])
    return {f"{at}_{name}_ms": float(x) for at, x in zip(("p50", "p99", "max"), found, strict=True)}
