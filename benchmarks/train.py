"""Training steps of both layouts, against two-branch convolutions and against attention alone.

    python -m benchmarks train > train.json

One optimizer step on one sequence in float32: forward pass with the chunked loss, backward pass,
clipping and AdamW. The ways take turns, so that a busy machine slows all alike.

`stu`, `hybrid`: the model as it is. `..._two_branch`: the same weights, with the convolution as it
is published (`benchmarks.convolution`) and torch's gradients.

`attention`: in every block, over the whole context, and MLPs smaller by as many weights as
attention has more than an STU. `attention_sdpa`: torch's `scaled_dot_product_attention` in its
place, which does without softcap and ALiBi. `attention_windowed`: the hybrid layout's window.

Memory is that of the first round, before each step of which freed memory goes back to the system:
gaps in the heap would hide what a step takes. Other rounds are faster for keeping it.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
from typing import Any

import torch
from torch.profiler import record_function

from benchmarks.machine import describe
from benchmarks.peak_memory import peak_gib
from benchmarks.train_profile import GROUPS, OPTIMIZER, profile
from benchmarks.train_ways import WAYS, flops_per_token, make_model
from stu.config import ModelConfig
from stu.model import FlashSTU
from train.loss import next_token_loss
from train.optimizer import OptimizerConfig, make_optimizer

VOCAB_SIZE, MLP_RATIO, CLIP_NORM = 4096, 4, 1.0
NUM_HEADS = 4
"""Of 128 channels, as in the published models. With 8, blocked attention over the whole context
would keep 17 GB of scores for its backward pass at 8,192 tokens."""
LONGEST_REPEATED = 60.0
"""Seconds: steps that take longer are not repeated."""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Speed, memory and ratios at each context, and profiles at the longest."""
    result: dict[str, Any] = {"machine": describe(), "profile_groups": GROUPS, "runs": []}
    for threads in args.threads:
        torch.set_num_threads(threads)
        for context in args.context:
            shape = ModelConfig(
                vocab_size=VOCAB_SIZE,
                width=args.width,
                num_layers=args.layers,
                max_seq_len=context,
                mlp_ratio=MLP_RATIO,
                num_heads=NUM_HEADS,
                window_tokens=args.window,
            )
            run = compare(shape, args.repeats, is_profiled=context == max(args.context))
            result["runs"].append({"threads": threads, **run})
    if args.plot:
        from benchmarks.train_plot import plot

        plot(result["runs"], args.plot)
    return result


def compare(shape: ModelConfig, repeats: int, is_profiled: bool) -> dict[str, Any]:
    """All ways at one context, the longest that `shape` has."""
    torch.manual_seed(0)
    context = shape.max_seq_len
    layouts = dict.fromkeys(way.layout for way in WAYS.values())
    trainees = {layout: Trainee(make_model(layout, shape)) for layout in layouts}
    for trainee in trainees.values():
        trainee.step(min(context, 64))  # AdamW's moments are there from now on
    memory: dict[str, float] = {}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for name, way in list(WAYS.items()) * repeats:
        if steps[name] and steps[name][0]["step"] > LONGEST_REPEATED:
            continue
        step = functools.partial(trainees[way.layout].step, context)
        with way.change():
            if name in memory:
                steps[name].append(step())
            else:
                seconds, memory[name] = peak_gib(step)
                steps[name].append(seconds)
        print(f"{context} tokens, {name}: {steps[name][-1]['step']:.2f} s", file=sys.stderr)
    ways = {}
    for name, way in WAYS.items():
        model = trainees[way.layout].model
        medians = {part: statistics.median(s[part] for s in steps[name]) for part in steps[name][0]}
        ways[name] = {
            "parameters": model.num_parameters(),
            "flops_per_token": flops_per_token(name, model, context),
            "tokens_per_second": context / medians["step"],
            "median_seconds": medians,
            "step_seconds": [step["step"] for step in steps[name]],
            "peak_memory_increase_gib": memory[name],
        }
    run = {
        "context": context,
        "width": shape.width,
        "layers": shape.num_layers,
        "window": shape.window_tokens,
        "ways": ways,
        "ratios": ratios({name: way["tokens_per_second"] for name, way in ways.items()}),
    }
    if is_profiled:
        profiled = {layout: trainees[layout] for layout in ("stu", "hybrid")}
        run["profiles"] = {
            layout: profile(functools.partial(trainee.step, context))
            for layout, trainee in profiled.items()
        }
    return run


class Trainee:
    """A model in training."""

    def __init__(self, model: FlashSTU) -> None:
        self.model, self.optimizer = model, make_optimizer(model, OptimizerConfig())

    def step(self, context: int) -> dict[str, float]:
        """One optimizer step on random tokens: seconds of its parts, and of all."""
        tokens = torch.randint(self.model.config.vocab_size, (1, context + 1))
        times = [time.perf_counter()]
        hidden = self.model.hidden(tokens[:, :-1]).flatten(0, 1)
        loss, _ = next_token_loss(hidden, self.model.embedding.weight, tokens[:, 1:].flatten())
        times.append(time.perf_counter())
        loss.backward()  # type: ignore[no-untyped-call]
        times.append(time.perf_counter())
        with record_function(OPTIMIZER):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
        times.append(time.perf_counter())
        forward, backward, optimizer = (b - a for a, b in itertools.pairwise(times))
        seconds = {"forward": forward, "backward": backward, "optimizer": optimizer}
        return {**seconds, "step": times[-1] - times[0]}


def ratios(speeds: dict[str, float]) -> dict[str, float]:
    """Of tokens per second: each layout over its two-branch form and over attention."""
    fastest = max(speeds["attention"], speeds["attention_sdpa"])
    result = {}
    for layout in ("stu", "hybrid"):
        result[f"{layout}_over_two_branch"] = speeds[layout] / speeds[f"{layout}_two_branch"]
        for name in ("attention", "attention_sdpa", "attention_windowed"):
            result[f"{layout}_over_{name}"] = speeds[layout] / speeds[name]
        result[f"{layout}_over_fastest_whole_attention"] = speeds[layout] / fastest
    return result
