"""What the cost model says of machines that are not at hand and of models that do not fit here.

Weights, keys and values in bfloat16, filters and FutureFill's caches in float32, as the engine has
them on a GPU; direct sums remember inputs alone, and bfloat16 does for them. Only the constants of
the data sheet stand between counted costs and time: launching kernels, scheduling and text are left
out. Nothing of this was measured; what an H100 really takes is in `docs/evidence.md`.
"""

import copy
import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from benchmarks import convolution_costs
from benchmarks.convolution_costs import naive
from benchmarks.costs import FLOAT_BYTES, window_costs
from benchmarks.decode_engine import other_bytes
from benchmarks.rates import Rates, of_gpu, step_parts
from serve.cache import tile_levels
from serve.cache.page_pool import pages_for
from serve.cache.tiles import TileFlush
from stu.config import ModelConfig
from stu.mixers import PastInputs, planned_mixers, remembered
from stu.model import FlashSTU
from train.flops import num_parameters
from train.gpus import GPUS
from train.plan.costs import USABLE_SHARE

MODELS = Path(__file__).parents[1] / "configs" / "model"
SIZES = ["hybrid-2.7b", "hybrid-7b", "hybrid-13b"]
GPU, HALF_BYTES = "h100-80g", 2
PROMPT_TOKENS, PAGE_LEN = 512, 32
LENGTHS = [512, 2048, 8192, 32768, 131072]
BATCHES = [1, 8, 32, 64, 256]
CACHES = ["paged", "naive"]
FEW_CHANNELS = 64
"""Whose filters have the same factors as those of any number."""


def extrapolated() -> dict[str, Any]:
    """Of each size, both caches at each batch and length."""
    rates = of_gpu(GPU)
    sizes = {name: size(name, rates) for name in SIZES}
    return {
        "gpu": GPU,
        "rates": {"bytes": rates.bytes, "products": rates.products, "ffts": rates.ffts},
        "prompt_tokens": PROMPT_TOKENS,
        "sizes": sizes,
    }


def size(name: str, rates: Rates) -> dict[str, Any]:
    """One model, with attention in a window in every second block, and with none."""
    config = ModelConfig.from_dict(yaml.safe_load((MODELS / f"{name}.yaml").read_text()))
    layouts = {
        layout: [
            cell(replace(config, layout=layout), batch, new_tokens, rates)
            for new_tokens, batch in itertools.product(LENGTHS, BATCHES)
        ]
        for layout in ("hybrid", "stu")
    }
    return {
        layout: {"parameters": num_parameters(replace(config, layout=layout)), "cells": cells}
        for layout, cells in layouts.items()
    }


def cell(config: ModelConfig, batch: int, new_tokens: int, rates: Rates) -> dict[str, Any]:
    """Milliseconds of a step with each cache, their shares, and whether they fit."""
    context = PROMPT_TOKENS + new_tokens
    config = replace(config, max_seq_len=context)
    past = remembered(planned_mixers(config), PastInputs)
    lag_step = past[0].lag_step
    shape = convolution_costs.Shape(
        layers=len(past),
        width=config.width,
        lag_step=lag_step,
        num_taps=-(-context // lag_step),
        batch=batch,
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=new_tokens,
        page_len=PAGE_LEN,
    )
    weights = HALF_BYTES * num_parameters(config)
    usable = USABLE_SHARE * GPUS[GPU].memory_gib * 2**30
    result: dict[str, Any] = {"batch": batch, "new_tokens": new_tokens}
    for cache in CACHES:
        paged = cache == "paged"
        # What is pending needs float32; inputs, which are all that direct sums keep, do not.
        number_bytes = FLOAT_BYTES if paged else HALF_BYTES
        counts = convolution_costs.paged(shape, tiles(shape)) if paged else naive(shape)
        windows = window_costs(config, PROMPT_TOKENS, new_tokens, HALF_BYTES)
        costs = convolution_costs.added(windows, counts.costs(shape, number_bytes))
        report = costs.report(weights, batch)
        parts = step_parts(report | {"batch": batch, "operations_per_step": 0}, rates)
        others = other_bytes(config, batch, PAGE_LEN, HALF_BYTES)
        held = convolution_costs.cache_bytes(cache, shape) * number_bytes // FLOAT_BYTES + others
        filters = FLOAT_BYTES * shape.layers * shape.width * shape.num_taps
        filters += tile_levels.CORE_BYTES if paged else 0
        total = sum(parts.values())
        result[cache] = {
            "step_ms": 1e3 * total,
            "dense_share": (parts["weights"] + parts["products"]) / total,
            "cache_gib": held / 2**30,
            "fits": weights + held + filters < usable,
        }
    result["times_as_fast"] = result["naive"]["step_ms"] / result["paged"]["step_ms"]
    return result


def tiles(shape: convolution_costs.Shape) -> TileFlush:
    """The factors of all tile sizes, with the cores that there is room to keep."""
    made = copy.copy(factorized(shape.prompt_tokens + shape.new_tokens, shape.new_tokens))
    levels, bytes_left = [], tile_levels.CORE_BYTES
    for level in made._levels:
        _, rank_out, rank_in = level.basis_cores.shape
        num_bytes = FLOAT_BYTES * shape.layers * shape.width * rank_out * rank_in
        if num_bytes <= bytes_left:
            bytes_left -= num_bytes
            level = replace(level, cores=level.basis_cores)  # its size is not looked at
        levels.append(level)
    made._levels = levels
    return made


@functools.cache
def factorized(context: int, new_tokens: int) -> TileFlush:
    """Of some channels of one layer, without cores."""
    config = ModelConfig(
        vocab_size=1, width=FEW_CHANNELS, num_layers=1, layout="stu", max_seq_len=context
    )
    torch.manual_seed(0)
    taps, lag_step = FlashSTU(config).convolution_taps()
    pages = torch.zeros(1, 1, PAGE_LEN, FEW_CHANNELS)
    with mock.patch.object(tile_levels, "CORE_BYTES", 0):
        return TileFlush(taps, lag_step, pages, pages_for(new_tokens - 1, PAGE_LEN))
