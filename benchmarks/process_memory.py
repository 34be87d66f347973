"""Memory of this process: freed memory that glibc keeps, and the peak of a call."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from stu.common.errors import UserError
from train.gpus import peak_bytes, resident_bytes

CLEAR_REFS = Path("/proc/self/clear_refs")
Result = TypeVar("Result")


def return_freed_memory() -> None:
    """Collect garbage, and return freed memory to the system where glibc is the allocator."""
    gc.collect()
    torch.cuda.empty_cache()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim:
        malloc_trim(0)


def peak_gib(call: Callable[[], Result]) -> tuple[Result, float]:
    """Return what `call` returns, and the peak of resident GiB beyond those before it.

    Freed memory is returned first, or gaps in the heap would hide what `call` takes. Raises
    UserError where the system does not tell the peak.
    """
    if not CLEAR_REFS.exists():
        raise UserError(message="the peak memory of a process is known on Linux only: run it there")
    return_freed_memory()
    before = resident_bytes()
    CLEAR_REFS.write_text("5")  # forgets the peak so far
    result = call()
    return result, peak_bytes(torch.device("cpu"), before) / 2**30
