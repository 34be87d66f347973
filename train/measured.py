"""What a run takes, by the device's own account."""

from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """What this process has of the machine's memory now; 0 where nothing tells."""
    return _status("VmRSS:")


def most_bytes(device: torch.device, resident_before: int) -> int:
    """Most that this process has had of a CUDA device's memory, or of the machine's beyond what it
    had at some moment (`resident_bytes`); 0 where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM:") - resident_before


def _status(name: str) -> int:
    if not STATUS.exists():
        return 0
    lines = STATUS.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
