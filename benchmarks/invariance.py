"""`stu-bench invariance`: does a request's company change its tokens?

Each prompt of a file is decoded greedily, and with temperature 1, by itself and among others. The
same settings give the same tokens, unless rounding tips a choice: matrix products round differently
for another number of rows. With `batch_invariant` they do not. A prompt counts as changed if any of
its tokens is another.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import Request
from serve.sampling import SamplingParams
from stu.checkpoint import load_model, load_tokenizer
from stu.model import FlashSTU
from stu.tokenizer import Tokenizer


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Shares of changed prompts, and tokens per second, with the option and without."""
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in read_prompts(args.prompts)]
    result: dict[str, Any] = {"machine": describe(), "prompts": len(prompts), "runs": []}
    for threads in args.threads:
        torch.set_num_threads(threads)
        for invariant in (False, True):
            run: dict[str, Any] = {"threads": threads, "batch_invariant": invariant}
            for name, temperature in {"greedy": 0.0, "temperature_1": 1.0}.items():
                requests = [
                    Request(prompt, args.new_tokens, SamplingParams(temperature, seed=seed))
                    for seed, prompt in enumerate(prompts)
                ]
                alone, _ = decode(model, tokenizer, requests, 1, invariant)
                together, speed = decode(model, tokenizer, requests, args.batch, invariant)
                pairs = list(zip(alone, together, strict=True))
                run[f"{name}_prompts_changed"] = sum(one != other for one, other in pairs)
                run[f"{name}_tokens"] = sum(map(len, alone))
                run[f"{name}_tokens_per_second"] = speed
            result["runs"].append(run)
    return result


def read_prompts(file: Path) -> list[str]:
    """Of JSON lines, the field `prompt`. Raises ValueError if one has none, or nothing is there."""
    prompts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{file}, line {number}: must be like {{"prompt": "some text"}}')
        prompts.append(row["prompt"])
    if not prompts:
        raise ValueError(f'{file}: no prompts; write lines like {{"prompt": "some text"}}')
    return prompts


def decode(
    model: FlashSTU, tokenizer: Tokenizer, requests: list[Request], batch: int, invariant: bool
) -> tuple[list[list[int]], float]:
    """Every request's tokens, so many decoded together, and tokens per second of decoding."""
    config = EngineConfig(cache_gib=0.5, max_running=batch, batch_invariant=invariant)
    engine = Engine(model, tokenizer, config)
    tokens: dict[int, list[int]] = {engine.add(request): [] for request in requests}
    start = time.perf_counter()
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.tokens
    seconds = time.perf_counter() - start
    return list(tokens.values()), sum(map(len, tokens.values())) / seconds
