"""The most memory that something takes on a CPU, as Linux tells it."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks import heap
from train.gpus import peak_bytes, resident_bytes

CLEAR_REFS = Path("/proc/self/clear_refs")
Result = TypeVar("Result")


def peak_gib(run: Callable[[], Result]) -> tuple[Result, float]:
    """What `run` returns, and the most GiB resident meanwhile beyond those before it.

    Freed memory goes back to the system first: gaps in the heap would hide what `run` takes. Raises
    ValueError where the system does not tell.
    """
    if not CLEAR_REFS.exists():
        raise ValueError("the most memory of a process is told by Linux alone: run this there")
    gc.collect()
    heap.give_back()
    before = resident_bytes()
    CLEAR_REFS.write_text("5")  # what was most so far is forgotten
    result = run()
    return result, peak_bytes(torch.device("cpu"), before) / 2**30
