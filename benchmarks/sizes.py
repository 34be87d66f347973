"""`benchmarks sizes`: what `stu-plan` says of the published sizes and of larger ones, on H100s.

Nothing is measured: memory is counted on tensors without contents, and times follow from data
sheets and the shares of them that `train/plan/costs.py` assumes.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import describe
from stu.config import ModelConfig
from train.flops import num_parameters, token_flops
from train.gpus import GPUS
from train.optimizer import OPTIMIZERS
from train.parallel.config import ParallelConfig
from train.plan.costs import USABLE_SHARE, exchanged_bytes, step_seconds
from train.plan.fits import Fits, stages

MODELS = Path(__file__).parents[1] / "configs" / "model"
SIZES = [
    # model, GPUs
    ("hybrid-340m", 8),
    ("hybrid-550m", 8),
    ("hybrid-2.7b", 16),
    ("hybrid-7b", 64),
    ("hybrid-13b", 128),
]
GPU, SEQ_LEN, TOKENS_A_STEP, TOKENS_A_PARAMETER = "h100-80g", 8192, 2**20, 20


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Of each size the memory by stage, and with the fastest that fits the speed."""
    return {"machine": describe(), "gpu": GPU, "sizes": [plan(*size) for size in SIZES]}


def plan(name: str, num_ranks: int) -> dict[str, Any]:
    """One size."""
    gpu = GPUS[GPU]
    config = ModelConfig.from_dict(yaml.safe_load((MODELS / f"{name}.yaml").read_text()))
    usable = USABLE_SHARE * gpu.memory_gib * 2**30
    state_bytes = OPTIMIZERS["adamw"].state_bytes
    fits = Fits(config, SEQ_LEN, num_ranks, usable, is_half=True, state_bytes=state_bytes)
    count = num_parameters(config)
    ways = []
    for recomputes in (False, True):
        for stage, parallel in stages(ParallelConfig(checkpoint_activations=recomputes)):
            if stage == "zero 0":  # not in bfloat16
                continue
            way = {"stage": stage, "recomputes": recomputes}
            way["gib"] = fits.memory(parallel, 1).total / 2**30
            way["largest_micro_batch"] = largest = fits.largest(parallel)
            if largest:
                way |= speed(config, parallel, num_ranks, largest)
            ways.append(way)
    flops = token_flops(config, SEQ_LEN, 1, recomputes=False)
    best = max((way for way in ways if "tokens_per_second" in way), key=_tokens_per_second)
    return {
        "model": name,
        "parameters": count,
        "gpus": num_ranks,
        "seq_len": SEQ_LEN,
        "gflops_per_token": flops.total / 1e9,
        "dense_share": flops.dense / flops.total,
        "convolution_share": flops.convolution / flops.total,
        "attention_share": flops.attention / flops.total,
        "ways": ways,
        "best": best,
        "tokens": TOKENS_A_PARAMETER * count,
        "days": TOKENS_A_PARAMETER * count / best["tokens_per_second"] / 86_400,
    }


def speed(
    config: ModelConfig, parallel: ParallelConfig, num_ranks: int, largest: int
) -> dict[str, float]:
    """With the micro-batch that makes steps of about `TOKENS_A_STEP`."""
    micro_batch = min(largest, max(1, TOKENS_A_STEP // (SEQ_LEN * num_ranks)))
    accumulated = max(1, TOKENS_A_STEP // (SEQ_LEN * num_ranks * micro_batch))
    seconds = step_seconds(
        config, GPUS[GPU], parallel, SEQ_LEN, micro_batch, accumulated, num_ranks
    )
    tokens = micro_batch * accumulated * num_ranks * SEQ_LEN
    sent = exchanged_bytes(config, parallel, num_ranks, accumulated, is_half=True)
    return {
        "micro_batch": micro_batch,
        "accumulated": accumulated,
        "tokens_per_second": tokens / seconds,
        "sent_gib_per_step": sent / 2**30,
    }


def _tokens_per_second(way: dict[str, Any]) -> float:
    value: float = way["tokens_per_second"]
    return value
