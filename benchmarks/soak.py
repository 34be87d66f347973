"""`python -m benchmarks soak`: an engine's memory under random traffic, for as long as you like.

Requests of random lengths and settings keep the queue filled; some are aborted, some go before
others. Every page must be free or owned once all along, and free at the end. What is reported is
the process's resident memory, and how much of it is neither the weights nor the caches nor what
the process took before it had any.
"""

import argparse
import gc
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.machine import describe
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.request import Request
from serve.sampling_params import SamplingParams
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.tokenizer import Tokenizer, train_bpe

VOCAB_SIZE, MOST_TOKENS, MOST_WAITING = 300, 1000, 8
MIB = 2**20


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the traffic for `args.seconds`."""
    torch.set_num_threads(args.threads)
    tokenizer = small_tokenizer()
    before = resident_bytes()
    engine, weights_bytes, cache_bytes = make_engine(tokenizer, args.cache_gib)
    samples = run(engine, args.seconds)
    known = before + weights_bytes + cache_bytes
    largest = max(sample["resident_mib"] for sample in samples)
    return {
        "machine": describe(),
        "process_before_mib": before / MIB,
        "weights_mib": weights_bytes / MIB,
        "caches_mib": cache_bytes / MIB,
        "largest_resident_mib": largest,
        "besides_mib": largest - known / MIB,
        "samples": samples,
    }


def make_engine(tokenizer: Tokenizer, cache_gib: float) -> tuple[Engine, int, int]:
    """A hybrid model of 28 M parameters in an engine, the bytes of its weights and of its caches.

    Filters count as weights; what the engine makes of them counts among what is not known.
    """
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=VOCAB_SIZE, max_seq_len=2 * MOST_TOKENS + 100)
    engine_config = EngineConfig(cache_gib=cache_gib, max_running=12, expected_new_tokens=300)
    model = FlashSTU(config)
    tensors = [*model.parameters(), *model.buffers()]
    weights_bytes = sum(its.numel() * its.element_size() for its in tensors)
    engine = Engine(model, tokenizer, engine_config)
    del model, tensors
    gc.collect()
    caches = engine._caches
    pool_bytes = sum(
        pool.pages.numel() * pool.pages.element_size() for pool in caches.pools if pool
    )
    rings = caches.convolution.num_bytes - caches.pools[0].pages.numel() * 4
    return engine, weights_bytes, pool_bytes + rings


def run(engine: Engine, seconds: float) -> list[dict[str, Any]]:
    """A sample of the state every minute, and at the end."""
    draw, running, samples = random.Random(0), [], []
    start = last = time.monotonic()
    while (now := time.monotonic()) - start < seconds:
        while engine.stats().waiting < MOST_WAITING:
            running.append(engine.add(random_request(draw)))
        if draw.random() < 0.005:
            engine.abort(draw.choice(running))
        ended = {its.request_id for its in engine.step() if its.finish_reason is not None}
        running = [its for its in running if its not in ended]
        if engine.stats().steps % 100 == 0:
            engine.check_integrity()
        if not samples or now - last >= 60:
            samples.append(sample(engine, now - start))
            last = now
    for request_id in running:
        engine.abort(request_id)
    engine.step()
    engine.check_integrity()
    stats = engine.stats()
    assert stats.convolution_pages_used == stats.attention_pages_used == 0, "a page is left"
    return [*samples, sample(engine, time.monotonic() - start)]


def random_request(draw: random.Random) -> Request:
    """Most are short; some have penalties, logprobs or a stop string, some are urgent."""
    length, count = (max(1, int(MOST_TOKENS * draw.random() ** 2)) for _ in range(2))
    sampling = SamplingParams(
        temperature=draw.choice([0.0, 1.0]),
        top_p=draw.choice([1.0, 0.9]),
        repetition_penalty=draw.choice([1.0, 1.0, 1.2]),
        logprobs=draw.choice([None, None, 3]),
        seed=draw.randrange(2**32),
        max_new_tokens=count,
        stop=draw.choice([[], ["the end"]]),
        stop_at_eos=False,
    )
    tokens = [draw.randrange(VOCAB_SIZE) for _ in range(length)]
    return Request(tokens, sampling, priority=int(draw.random() < 0.9))


def sample(engine: Engine, seconds: float) -> dict[str, Any]:
    stats = engine.stats()
    result = {
        "seconds": round(seconds),
        "resident_mib": resident_bytes() / MIB,
        "steps": stats.steps,
        "new_tokens": stats.new_tokens,
        "running": stats.running,
        "preemptions": stats.preemptions,
        "convolution_pages_used": stats.convolution_pages_used,
        "convolution_pages": stats.convolution_pages,
    }
    print(result, file=sys.stderr, flush=True)
    return result


def small_tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        texts = ["the end of the beginning, and the beginning of the end\n"] * 20
        return train_bpe(texts, VOCAB_SIZE, Path(folder) / "tokenizer.model")


def resident_bytes() -> int:
    """Of this process."""
    resident: int = psutil.Process().memory_info().rss
    return resident
