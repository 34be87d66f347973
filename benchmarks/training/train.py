"""`python -m benchmarks train`: training steps against two-branch convolutions and attention.

One optimizer step on one sequence in float32: forward pass with the chunked loss, backward pass,
clipping and AdamW. The variants of the model (`benchmarks.training.variants`) take turns.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jsonargparse.typing import PositiveInt

from benchmarks.machine import describe
from benchmarks.timing import median_seconds
from benchmarks.training.variants import VARIANTS, Variant, make_model
from stu.config import ModelConfig
from stu.model import FlashSTU
from train.loss import next_token_loss
from train.optimizer import OptimizerConfig, make_optimizer

VOCAB_SIZE, MLP_RATIO, CLIP_NORM = 4096, 4, 1.0
NUM_HEADS = 4
"""Heads of 128 channels, as in the published models."""


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    context: tuple[PositiveInt, ...] = (2048, 8192)
    """Tokens of the sequence, for example [2048]."""
    width: PositiveInt = 512
    """Width of the models."""
    layers: PositiveInt = 8
    """Blocks of the models."""
    window: PositiveInt = 1024
    """Tokens of the attention windows."""
    repeats: PositiveInt = 3
    """Timed steps of each variant."""


def measure(options: Options) -> dict[str, Any]:
    """Return the speed of each variant at each context, and ratios."""
    return {
        "machine": describe(),
        "runs": [compare(options, context) for context in options.context],
    }


def compare(options: Options, context: int) -> dict[str, Any]:
    """Return the figures at one context."""
    shape = ModelConfig(
        vocab_size=VOCAB_SIZE,
        width=options.width,
        num_layers=options.layers,
        max_seq_len=context,
        mlp_ratio=MLP_RATIO,
        num_heads=NUM_HEADS,
        window_tokens=options.window,
    )
    torch.manual_seed(0)
    layouts = dict.fromkeys(variant.layout for variant in VARIANTS.values())
    trainees = {layout: Trainee(make_model(layout, shape)) for layout in layouts}
    steps = {
        name: partial(trainees[variant.layout].step, variant, context)
        for name, variant in VARIANTS.items()
    }
    seconds = median_seconds(steps, options.repeats)
    speeds = {name: context / seconds[name] for name in VARIANTS}
    ratios = {}
    for layout in ("stu", "hybrid"):
        ratios[f"{layout}_over_two_branch"] = speeds[layout] / speeds[f"{layout}_two_branch"]
        for name in ("attention_sdpa", "attention_windowed"):
            ratios[f"{layout}_over_{name}"] = speeds[layout] / speeds[name]
    run: dict[str, Any] = {"threads": torch.get_num_threads(), "context": context}
    run |= {name: getattr(options, name) for name in ("width", "layers", "window")}
    run["ways"] = {}  # as in the recorded results
    for name, variant in VARIANTS.items():
        parameters = trainees[variant.layout].model.num_parameters()
        run["ways"][name] = {"parameters": parameters, "tokens_per_second": speeds[name]}
    return run | {"ratios": ratios}


class Trainee:
    """A model in training."""

    def __init__(self, model: FlashSTU) -> None:
        self.model, self.optimizer = model, make_optimizer(model, OptimizerConfig())

    def step(self, variant: Variant, context: int) -> None:
        """Make one optimizer step on random tokens."""
        tokens = torch.randint(self.model.config.vocab_size, (1, context + 1))
        with variant.change():
            hidden = self.model.hidden(tokens[:, :-1]).flatten(0, 1)
            loss, _ = next_token_loss(hidden, self.model.embedding.weight, tokens[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
