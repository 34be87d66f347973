"""Description of the machine and of the versions behind a result."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.recorded import ROOT

PACKAGES = ["numpy", "transformers", "deepspeed", "sentencepiece", "tokenizers", "tiktoken"]
NOT_RESULTS = [":(exclude)*.json", ":(exclude)*.png"]
"""Files that a benchmark is about to write do not count as changes."""


def describe() -> dict[str, Any]:
    """Return machine, versions, time and commit, for the head of a result."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": platform.platform(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(ROOT),
    }


def version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit(folder: Path) -> str:
    """Return the commit that is checked out, with `-dirty` if files other than results differ."""
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", folder, *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--", ".", *NOT_RESULTS],
            )
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return "unknown"
    return f"{head}-dirty" if changes else head
