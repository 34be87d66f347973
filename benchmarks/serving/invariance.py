"""`python -m benchmarks invariance`: does batch composition change a request's tokens?

Prompts of different lengths, pieces of a validation split, are decoded greedily and at temperature
1, one at a time and many at a time. The tokens are the same unless rounding tips a choice: matrix
products of different numbers of rows round differently, except with `batch_invariant`. A prompt
counts as changed if any of its tokens differs.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt

from benchmarks.machine import describe
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.request import Request
from serve.sampling_params import SamplingParams
from stu.common.errors import UserError
from stu.model_dir import load_model, load_tokenizer
from stu.tokenizer import Tokenizer
from train.data.shards import TokenShards


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    model: Path
    """Folder of a trained model."""
    data: Path
    """Folder of the token shards whose validation split is read."""
    prompts: PositiveInt = 100
    """Number of prompts."""
    prompt_tokens: PositiveInt = 64
    """Tokens of the longest prompt."""
    new_tokens: PositiveInt = 128
    """New tokens of each prompt."""
    batch: PositiveInt = 32
    """Most prompts that are decoded at a time."""


def measure(options: Options) -> dict[str, Any]:
    """Return how many prompts changed, and tokens per second, with the option and without."""
    tokenizer = load_tokenizer(options.model)
    prompts = read_prompts(options.data, tokenizer, options.prompts, options.prompt_tokens)
    runs = []
    for invariant in (False, True):
        run: dict[str, Any] = {"threads": torch.get_num_threads(), "batch_invariant": invariant}
        for name, temperature in {"greedy": 0.0, "temperature_1": 1.0}.items():
            params = SamplingParams(
                temperature, max_new_tokens=options.new_tokens, stop_at_eos=False
            )
            requests = [
                Request(prompt, replace(params, seed=seed)) for seed, prompt in enumerate(prompts)
            ]
            alone, _ = decode(options.model, requests, 1, invariant)
            together, speed = decode(options.model, requests, options.batch, invariant)
            pairs = zip(alone, together, strict=True)
            run[f"{name}_prompts_changed"] = sum(first != second for first, second in pairs)
            run[f"{name}_tokens"] = sum(map(len, alone))
            run[f"{name}_tokens_per_second"] = speed
        runs.append(run)
    return {"machine": describe(), "prompts": len(prompts), "runs": runs}


def read_prompts(folder: Path, tokenizer: Tokenizer, count: int, longest: int) -> list[list[int]]:
    """Return pieces of 1 to `longest` tokens from evenly spaced places of the validation split.

    Raises UserError if another tokenizer made them, or the split is too short for `count` pieces.
    """
    shards = TokenShards(folder, "validation")
    if shards.index.tokenizer_sha256 != tokenizer.sha256:
        raise UserError("data", str(folder), "made by the model's tokenizer")
    if len(shards) < count * longest:
        raise UserError(
            message=f"{folder}: {len(shards)} tokens for validation do not make {count} prompts of "
            f"up to {longest}; lower --prompts or --prompt-tokens"
        )
    starts = [i * len(shards) // count for i in range(count)]
    return [shards.read(start, start + 1 + i % longest).tolist() for i, start in enumerate(starts)]


def decode(
    model: Path, requests: list[Request], batch: int, invariant: bool
) -> tuple[list[list[int]], float]:
    """Decode the requests, at most `batch` at a time; return their tokens and tokens per second."""
    config = EngineConfig(cache_gib=0.5, max_running=batch, batch_invariant=invariant)
    engine = Engine(load_model(model), load_tokenizer(model), config)
    tokens: dict[int, list[int]] = {engine.add(request): [] for request in requests}
    start = time.perf_counter()
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.new_token_ids
    seconds = time.perf_counter() - start
    return list(tokens.values()), sum(map(len, tokens.values())) / seconds
