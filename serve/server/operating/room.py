"""Whether memory has room for the replicas of another version beside those that run."""

import math
from collections import Counter
from pathlib import Path

import psutil
from safetensors import SafetensorError, safe_open

from serve.server.replicas.dispatch import Replicas
from stu.common.errors import UserError
from stu.common.machine import allowed_bytes

GIB = 2**30
OVERHEAD_BYTES = GIB
"""Memory of a replica besides weights and caches: libraries, a GPU's context, temporaries."""
WEIGHT_COPIES = 2
"""Copies of the weights while an engine reorders them."""


def fits_beside(running: Replicas, model: Path) -> bool:
    """Return whether each device has room for as many more replicas, with another model.

    There is none where the size of caches is not set: each engine takes half of the memory that it
    finds, and a second one would find less, and keep less.
    """
    config = running.config
    if config.engine.cache_gib is None:
        return False
    weights = weight_bytes(model, config.dtype)
    own = int(config.engine.cache_gib * GIB) + WEIGHT_COPIES * weights + OVERHEAD_BYTES
    # Each rank of a replica has caches of its own, on a CPU too.
    needed = Counter(device for group in config.devices for device in group.split(","))
    return all(count * own <= free_bytes(running, device) for device, count in needed.items())


def weight_bytes(model: Path, dtype: str) -> int:
    """Return the bytes of a model's weights in a dtype. Raises UserError if there are none."""
    file = model / "model.safetensors"
    try:
        with safe_open(file, framework="pt") as archive:
            names = archive.keys()
            shapes = [archive.get_slice(name).get_shape() for name in names]
    except (OSError, SafetensorError) as error:
        raise UserError("model", message=f"{file}: cannot be read ({error})") from error
    return sum(map(math.prod, shapes)) * {"float32": 4, "bfloat16": 2}[dtype]


def free_bytes(running: Replicas, device: str) -> int:
    """Return the free bytes of a device: of a GPU as its replicas last reported it, since asking
    itself takes memory there. Only the first rank of a group reports, so others count as full."""
    if not device.startswith("cuda"):
        return int(min(psutil.virtual_memory().available, allowed_bytes()))
    reported = [
        own.free_bytes
        for group, own in running.devices_of_running()
        if device == group.split(",")[0]
    ]
    return min(reported, default=0)
