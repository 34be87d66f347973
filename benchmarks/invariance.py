"""`python -m benchmarks invariance`: does a request's company change its tokens?

Prompts of unlike lengths, pieces of a validation split, are each decoded greedily, and with
temperature 1, by themselves and among others. The same settings give the same tokens, unless
rounding tips a choice: matrix products round differently for another number of rows. With
`batch_invariant` they do not. A prompt counts as changed if any of its tokens is another.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.request import Request
from serve.sampling_params import SamplingParams
from stu.model import FlashSTU
from stu.model_dir import load_model, load_tokenizer
from stu.tokenizer import Tokenizer
from train.data.shards import TokenShards


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Shares of changed prompts, and tokens per second, with the option and without."""
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    prompts = read_prompts(args.data, tokenizer, args.prompts, args.prompt_tokens)
    result: dict[str, Any] = {"machine": describe(), "prompts": len(prompts), "runs": []}
    for threads in args.threads:
        torch.set_num_threads(threads)
        for invariant in (False, True):
            run: dict[str, Any] = {"threads": threads, "batch_invariant": invariant}
            for name, temperature in {"greedy": 0.0, "temperature_1": 1.0}.items():
                requests = [
                    Request(
                        prompt,
                        SamplingParams(
                            temperature,
                            seed=seed,
                            max_new_tokens=args.new_tokens,
                            stop_at_eos=False,
                        ),
                    )
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


def read_prompts(folder: Path, tokenizer: Tokenizer, count: int, longest: int) -> list[list[int]]:
    """Pieces of 1 to `longest` tokens from evenly spaced places of the validation split.

    Raises ValueError if another tokenizer made them, or there are too few to make `count` of.
    """
    shards = TokenShards(folder, "validation")
    if shards.index.tokenizer_sha256 != tokenizer.sha256:
        raise ValueError(f"{folder}: not the model's tokenizer; give the folder it was trained on")
    if len(shards) < count * longest:
        raise ValueError(
            f"{folder}: {len(shards)} tokens for validation do not make {count} prompts of up to "
            f"{longest}; lower --prompts or --prompt-tokens"
        )
    starts = [i * len(shards) // count for i in range(count)]
    lengths = [1 + i % longest for i in range(count)]
    return [
        shards.read(start, start + length).tolist()
        for start, length in zip(starts, lengths, strict=True)
    ]


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
            tokens[output.request_id] += output.new_token_ids
    seconds = time.perf_counter() - start
    return list(tokens.values()), sum(map(len, tokens.values())) / seconds
