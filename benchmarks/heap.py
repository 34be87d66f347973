"""Where the memory goes that this process frees: glibc's choice, where there is glibc."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of mallopt(3), by default 128 KiB and 65,536."""
SPARE = 2
"""Times as much as is to be allocated: filters, spectra and work space come with it."""


@contextmanager
def kept() -> Iterator[None]:
    """Keep it for what is allocated next. A system clears memory before it hands it out again, on
    some virtual machines at less than half a gigabyte a second."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        mallopt(M_MMAP_MAX, 2**16)
        mallopt(M_TRIM_THRESHOLD, 2**17)
        give_back()


def make_room(num_bytes: int) -> None:
    """Give it back if there might be too little for so many bytes."""
    if psutil.virtual_memory().available < SPARE * num_bytes:
        give_back()


def give_back() -> None:
    """All of it, now."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim:
        malloc_trim(0)
