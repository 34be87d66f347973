"""Arrays that take long to compute, kept on disk from one process to the next."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from stu.common.files import cache_folder

Arrays = Mapping[str, NDArray[np.float64]]


def cached_arrays(key: str, compute: Callable[[], Arrays]) -> Arrays:
    """Return the arrays that `compute` returns, from disk if they are there.

    key: Name that says everything the arrays depend on. A file that is cut short or damaged is
    computed again; without room on the disk nothing is kept.
    """
    path = cache_folder() / f"{key}.safetensors"
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError):
        arrays = compute()
    _write(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
    return arrays


def _write(path: Path, contents: bytes) -> None:
    """Write by renaming, so that a concurrent reader sees a whole file; ignore a full disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(contents)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
