"""`python -m benchmarks prefixes`: prompts that begin alike, and a long one beside running rows.

An engine that remembers prefixes is compared with one that does not: in a chat whose turns repeat
all that was said, and with requests that begin with one system prompt. Then a long prompt comes in
beside requests that decode, and alone, in chunks and whole. Times are of the processor, so that
other processes count less. Weights are random, on which speed does not depend.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
from jsonargparse.typing import PositiveInt

from benchmarks.gpu_check.engines import NoText
from benchmarks.machine import describe
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.request import Output, Request
from serve.sampling_params import SamplingParams
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.tokenizer import Tokenizer

VOCAB_SIZE, CACHE_GIB = 4096, 1.0
OWN_TOKENS, NEW_TOKENS = 24, 8
"""Prompt tokens of a turn or request that are its own, and tokens of an answer."""
SHARE = 5
"""Requests of which one is run without prefixes: each takes as long as the others."""
PLAIN_STEPS = 32
"""Steps that are timed before the long prompt comes."""


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    width: PositiveInt = 512
    """Width of the model."""
    layers: PositiveInt = 4
    """Blocks of the model."""
    layout: str = "stu"
    """Mixers of the model."""
    history_tokens: PositiveInt = 8000
    """Tokens of the chat before its first turn."""
    turns: PositiveInt = 10
    """Turns of the chat."""
    requests: PositiveInt = 200
    """Requests with one system prompt."""
    system_tokens: PositiveInt = 2000
    """Tokens of the system prompt."""
    rows: PositiveInt = 32
    """Requests that decode while the long prompt comes in."""
    prompt_tokens: PositiveInt = 32000
    """Tokens of the long prompt."""
    tokens_per_step: PositiveInt = 256
    """Most tokens of it that a step prefills."""


def measure(options: Options) -> dict[str, Any]:
    """Measure the chat, the system prompt and the long prompt."""
    chat_tokens = options.history_tokens + options.turns * (OWN_TOKENS + NEW_TOKENS)
    longest = max(chat_tokens, options.system_tokens + OWN_TOKENS, options.prompt_tokens)
    config = ModelConfig(
        VOCAB_SIZE,
        width=options.width,
        num_layers=options.layers,
        layout=options.layout,
        max_seq_len=longest + NEW_TOKENS,
    )
    torch.manual_seed(0)
    model = FlashSTU(config).eval()
    run: dict[str, Any] = {"threads": torch.get_num_threads(), "layout": config.layout}
    run |= {"width": config.width, "layers": config.num_layers}
    run |= {"chat": chat(model, options), "system": system_prompt(model, options)}
    return {"machine": describe(), "runs": [run | {"long": long_prompt(model, options)}]}


def chat(model: FlashSTU, options: Options) -> dict[str, Any]:
    """Return the prompt tokens and the seconds to the first new token of each turn, and the seconds
    of the last turn where nothing is remembered."""
    engine, prompt = make_engine(model), random_tokens(options.history_tokens, 0)
    turns: list[dict[str, float]] = []
    for number in range(options.turns):
        asked = prompt + random_tokens(OWN_TOKENS, 1 + number)
        before = engine.stats().prompt_tokens
        answer, seconds = answered(engine, asked)
        turns.append({"prompt_tokens": len(asked), "new_tokens": len(asked) - len(prompt)})
        computed = engine.stats().prompt_tokens - before
        turns[-1] |= {"computed_tokens": computed, "seconds": seconds}
        prompt = asked + answer
    _, plain = answered(make_engine(model, prefix_cache_gib=0), asked)
    return {"turns": turns, "plain_seconds": plain, "speedup": plain / turns[-1]["seconds"]}


def system_prompt(model: FlashSTU, options: Options) -> dict[str, float]:
    """Return the requests per second with one system prompt, remembered or not."""
    system, numbers = random_tokens(options.system_tokens, 0), range(options.requests)
    prompts = [system + random_tokens(OWN_TOKENS, 1 + number) for number in numbers]
    figures = {"requests": float(len(prompts)), "system_tokens": float(len(system))}
    for name, own, gib in (("", prompts, None), ("plain_", prompts[::SHARE], 0)):
        engine = make_engine(model, prefix_cache_gib=gib)
        for prompt in own:
            engine.add(request(prompt))
        figures[f"{name}requests_per_second"] = len(own) / sum(to_the_end(engine))
    speedup = figures["requests_per_second"] / figures["plain_requests_per_second"]
    return figures | {"speedup": speedup}


def long_prompt(model: FlashSTU, options: Options) -> dict[str, float]:
    """Return the milliseconds of steps without and with a chunk of a long prompt, and the seconds
    of the prompt alone, in chunks and whole."""
    prompt, own = random_tokens(options.prompt_tokens, 0), {"prefix_cache_gib": 0}
    whole = make_engine(model, prompt_tokens_per_step=len(prompt), **own)
    own |= {"prompt_tokens_per_step": options.tokens_per_step, "max_running": options.rows + 1}
    engine = make_engine(model, **own)
    seconds = []
    for alone in (whole, engine):
        alone.add(request(prompt, new_tokens=1))
        seconds.append(to_the_end(alone))
    for number in range(options.rows):
        row_prompt = random_tokens(OWN_TOKENS, number)
        engine.add(request(row_prompt, model.config.max_seq_len - OWN_TOKENS))
    decoding: set[int] = set()
    while len(decoding) < options.rows:
        decoding |= {output.request_id for output in engine.step()}
    step = median(timed_step(engine)[0] for _ in range(PLAIN_STEPS))
    last, gaps = engine.add(request(prompt, new_tokens=1)), []
    while last not in decoding:
        gap, outputs = timed_step(engine)
        gaps.append(gap)
        decoding |= {output.request_id for output in outputs}
    (whole_seconds, chunked_seconds), chunk = map(sum, seconds), median(seconds[1])
    figures = {"step": step, "chunk": chunk, "median_gap": median(gaps), "longest_gap": max(gaps)}
    return {
        **{name: float(getattr(options, name)) for name in ("rows", "tokens_per_step")},
        "prompt_tokens": float(len(prompt)),
        **{f"{name}_ms": 1e3 * own for name, own in figures.items()},
        "steps_beyond_chunk": (max(gaps) - chunk) / step,
        "chunked_seconds": chunked_seconds,
        "whole_seconds": whole_seconds,
        "chunked_over_whole": chunked_seconds / whole_seconds,
    }


def make_engine(model: FlashSTU, **settings: Any) -> Engine:
    """Return an engine of a model with random weights."""
    tokenizer = cast(Tokenizer, NoText(model.config.vocab_size))
    return Engine(model, tokenizer, EngineConfig(cache_gib=CACHE_GIB, **settings))


def request(prompt: Sequence[int], new_tokens: int = NEW_TOKENS) -> Request:
    """Return a request that decodes greedily, to its length."""
    return Request(prompt, SamplingParams(max_new_tokens=new_tokens, stop_at_eos=False))


def random_tokens(count: int, seed: int) -> list[int]:
    """Return random tokens."""
    source = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(VOCAB_SIZE, (count,), generator=source).tolist()
    return tokens


def answered(engine: Engine, prompt: Sequence[int]) -> tuple[list[int], float]:
    """Return the answer to a prompt, and the seconds to its first token."""
    engine.add(request(prompt))
    tokens, to_first = list[int](), 0.0
    while engine.has_work:
        seconds, outputs = timed_step(engine)
        to_first += 0 if tokens else seconds
        tokens += [token for output in outputs for token in output.new_token_ids]
    return tokens, to_first


def to_the_end(engine: Engine) -> list[float]:
    """Return the seconds of each step until all requests have ended."""
    seconds = []
    while engine.has_work:
        seconds.append(timed_step(engine)[0])
    return seconds


def timed_step(engine: Engine) -> tuple[float, list[Output]]:
    """Run a step; return its seconds of the processor, and its outputs."""
    start = time.process_time()
    outputs = engine.step()
    return time.process_time() - start, outputs
