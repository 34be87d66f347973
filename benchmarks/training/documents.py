"""`python -m benchmarks documents`: training steps with documents kept apart against together.

Forward and backward pass of two blocks, in float32 on a CPU. Lengths of documents are lognormal,
and the last one of a row is cut. Times are those of the processor, which other work on the machine
changes little, with 1 thread.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import PositiveInt

from benchmarks.machine import describe
from benchmarks.process_memory import peak_gib
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.sequences.base import WHOLE
from stu.sequences.documents import Documents

MODELS: dict[str, dict[str, Any]] = {
    "STU": {"layout": "stu"},
    "STU, full form": {"layout": "stu", "stu_form": "full", "num_filters": 4},
    "hybrid": {"layout": "hybrid"},
    "Hyena": {"layout": "hyena"},
    "attention in a window": {"layout": "attention"},
}


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    seq_len: PositiveInt = 4096
    """Tokens of a row."""
    rows: PositiveInt = 2
    """Rows of a batch."""
    width: PositiveInt = 64
    """Model width."""
    mean_tokens: PositiveInt = 800
    """Mean length of a document, before rows cut it."""
    window_tokens: PositiveInt = 1024
    """Tokens that attention sees before the current one."""
    repeats: PositiveInt = 3
    """Timed passes of each way."""


def measure(options: Options) -> dict[str, Any]:
    """Return the seconds of a pass for each model and way, which take turns, and the peak of
    memory."""
    source = np.random.default_rng(0)
    rows = [document_lengths(source, options) for _ in range(options.rows)]
    runs = []
    for name, layout in MODELS.items():
        torch.manual_seed(0)
        shape: dict[str, Any] = {"vocab_size": 50, "num_layers": 2, "num_heads": 1} | layout
        shape |= {"width": options.width, "max_seq_len": options.seq_len}
        model = FlashSTU(ModelConfig(**shape, window_tokens=options.window_tokens))
        tokens = torch.randint(50, (options.rows, options.seq_len))
        ways = {"together": None, "apart": rows, "one_a_row": [[options.seq_len]] * options.rows}

        def step(
            lengths: Sequence[Sequence[int]] | None,
            model: FlashSTU = model,
            tokens: torch.Tensor = tokens,
        ) -> None:
            model.zero_grad()
            sequences = WHOLE if lengths is None else Documents(lengths)
            model.hidden(tokens, sequences).square().mean().backward()  # type: ignore[no-untyped-call]

        calls = {key: lambda lengths=lengths: step(lengths) for key, lengths in ways.items()}
        seconds = processor_seconds(calls, options.repeats)
        memory = {f"{key}_gib": peak_gib(call)[1] for key, call in calls.items()}
        run = {"model": name, "documents": sum(map(len, rows)), "threads": torch.get_num_threads()}
        ratios = {
            f"{key}_ratio": value / seconds["together"]
            for key, value in seconds.items()
            if key != "together"
        }
        runs.append(run | {f"{key}_seconds": s for key, s in seconds.items()} | ratios | memory)
    return {"machine": describe(), "options": vars(options), "runs": runs}


def processor_seconds(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each call, after a first one to warm up; calls take turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn:
                taken[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def document_lengths(source: np.random.Generator, options: Options) -> list[int]:
    """Return the lengths of documents that fill a row."""
    lengths, left = [], int(options.seq_len)
    while left:
        length = source.lognormal(np.log(options.mean_tokens) - 0.5)
        lengths.append(min(left, max(1, int(length))))
        left -= lengths[-1]
    return lengths
