"""What a run takes, by the device's own account."""

from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def memory_bytes(device: torch.device | None = None) -> int:
    """Most that this process has had on a CUDA device, or of the machine's memory; there without a
    device what it has now. 0 where nothing tells."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if torch.cuda.is_available() or not STATUS.exists():
        return 0
    name = "VmRSS:" if device is None else "VmHWM:"
    lines = STATUS.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
