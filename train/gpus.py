"""Data-sheet figures of GPUs, and a process's peak memory as the device reports it."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

MEMORY_TOLERANCE = 0.1
"""Share by which the memory that CUDA reports may differ from the data sheet's."""
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Gpu:
    """One kind of accelerator, from the data sheet of its maker."""

    cuda_name: str
    """Word in the name that CUDA reports."""
    memory_gib: float
    flops: float
    """Dense bfloat16 operations per second, summed in float32."""
    bytes_per_second: float
    """Bandwidth of the GPU's own memory."""
    network_bytes_per_second: float
    """Bandwidth to other nodes in each direction, per GPU of a usual host."""
    link_bytes_per_second: float
    """Bandwidth to the other GPUs of a host in each direction."""


GPUS = {
    "a100-40g": Gpu("A100", 40, 312e12, 1.56e12, 25e9, 300e9),
    "a100-80g": Gpu("A100", 80, 312e12, 2.04e12, 25e9, 300e9),
    "h100-80g": Gpu("H100", 80, 989e12, 3.35e12, 50e9, 450e9),
    "h200-141g": Gpu("H200", 141, 989e12, 4.8e12, 50e9, 450e9),
    "l40s-48g": Gpu("L40S", 48, 362e12, 0.864e12, 12.5e9, 32e9),
}
"""NVIDIA's data sheets of A100, H100 SXM, H200 and L40S. Networks are those of DGX hosts (200 and
400 Gbit/s per GPU), and 100 Gbit/s; links are NVLink and, on L40S, PCIe."""


def known_gpu(device: torch.device) -> str | None:
    """Return the key of `device` in `GPUS`, or None if name and memory size match none."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    memory_gib = properties.total_memory / 2**30
    for name, gpu in GPUS.items():
        is_named = re.search(rf"\b{gpu.cuda_name}\b", properties.name)
        if is_named and math.isclose(memory_gib, gpu.memory_gib, rel_tol=MEMORY_TOLERANCE):
            return name
    return None


def resident_bytes() -> int:
    """Return this process's resident memory, or 0 where the system does not report it."""
    return _status("VmRSS:")


def peak_bytes(device: torch.device, resident_before: int) -> int:
    """Return the peak memory of this process.

    On CUDA: the most that was allocated on `device`. On a CPU: the peak of resident memory above
    `resident_before`, or 0 where the system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return max(0, _status("VmHWM:") - resident_before)


def _status(name: str) -> int:
    if not STATUS.exists():
        return 0
    lines = STATUS.read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)
