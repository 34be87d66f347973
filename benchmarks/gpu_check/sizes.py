"""Sizes of the check: those for a GPU with 80 GB, and small ones for tests on a CPU."""

from dataclasses import dataclass, replace
from typing import Any

import yaml

from benchmarks.recorded import ROOT
from stu.config import ModelConfig


@dataclass(frozen=True)
class Training:
    """A model to train, in bfloat16 with float32 weights."""

    micro_batch: int
    """Sequences of a step."""
    recomputes: bool
    """Whether activations are computed again in the backward pass."""


@dataclass(frozen=True)
class Sizes:
    """Everything that the check measures, and for how long."""

    models: dict[str, ModelConfig]
    """Models that decode."""
    batches: tuple[int, ...]
    eager_batches: tuple[int, ...]
    """Batches with steps launched from Python."""
    weight_batches: tuple[int, ...]
    """Batches with weights of 8 bits."""
    compiled_rows: int
    """Rows of the kernels that are compared with compiled ones."""
    peer_batches: tuple[int, ...]
    """Batches of the peer, each of which is compiled anew."""
    context: int
    """Prompt tokens of each sequence that decodes."""
    warm_steps: int
    steps: int
    """Steps that are timed."""
    prompt: int
    """Tokens of the prompt whose prefill is timed."""
    training: dict[str, Training]
    """Models that train, which are among those that decode."""
    train_tokens: int
    """Tokens of a training sequence."""
    train_steps: int
    energy_seconds: float
    """Seconds over which energy is counted; the driver counts every tenth of a second."""
    read_bytes: int
    """Bytes that are read to measure the memory."""
    text_model: ModelConfig
    """A model of bytes."""
    text_bytes: int
    """Bytes of text, of which it is trained on nine tenths, and tested on the rest."""
    quality_steps: int
    """Its training steps."""
    quality_texts: int
    """Texts that it is tested on."""


STU_2_7B = ModelConfig(vocab_size=4096, width=2560, num_layers=32, layout="stu", num_heads=20)
"""The model of 2.7 B parameters in the recorded results. Heads are those of its peer."""
LENGTH = 9216
"""Longest context of the models, which has room for the prompt and for all steps."""
NAMES = ("stu-2.7b", "hybrid-550m", "hybrid-2.7b")


def full_sizes() -> Sizes:
    """Return the sizes for a GPU."""
    models = {
        "stu-2.7b": STU_2_7B,
        **{name: published(name) for name in NAMES[1:]},
    }
    return Sizes(
        models={name: replace(config, max_seq_len=LENGTH) for name, config in models.items()},
        batches=(1, 8, 32, 128, 256),
        eager_batches=(1, 32),
        weight_batches=(1, 8, 32, 256),
        compiled_rows=32,
        peer_batches=(1, 32, 256),
        context=512,
        warm_steps=32,
        steps=64,
        prompt=8192,
        training={"hybrid-550m": Training(2, False), "hybrid-2.7b": Training(1, True)},
        train_tokens=8192,
        train_steps=5,
        energy_seconds=1.5,
        read_bytes=2**32,
        text_model=ModelConfig(vocab_size=256, max_seq_len=512),
        text_bytes=4_000_000,
        quality_steps=150,
        quality_texts=64,
    )


def tiny_sizes() -> Sizes:
    """Return the sizes for tests."""
    tiny: dict[str, Any] = {"vocab_size": 280, "width": 32, "num_layers": 2, "num_heads": 2}
    tiny |= {"mlp_ratio": 2, "num_filters": 4, "window_tokens": 40, "max_seq_len": 512}
    layouts = dict(zip(NAMES, ("stu", "hybrid", "hybrid"), strict=True))
    return Sizes(
        models={name: ModelConfig(**tiny, layout=layout) for name, layout in layouts.items()},
        batches=(3,),
        eager_batches=(2,),
        weight_batches=(3,),
        compiled_rows=3,
        peer_batches=(3,),
        context=20,
        warm_steps=2,
        steps=6,
        prompt=70,
        training={"hybrid-550m": Training(2, False), "hybrid-2.7b": Training(1, True)},
        train_tokens=48,
        train_steps=2,
        energy_seconds=0.0,
        read_bytes=2**20,
        text_model=ModelConfig(**tiny, layout="hybrid"),
        text_bytes=20_000,
        quality_steps=1,
        quality_texts=2,
    )


SIZES = {"full": full_sizes, "tiny": tiny_sizes}


def published(name: str) -> ModelConfig:
    """Return a model of `configs/model`."""
    text = (ROOT / "configs" / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    return ModelConfig.from_dict(yaml.safe_load(text))
