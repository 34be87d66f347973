"""Checks that each node makes by itself, and facts about it to compare with other nodes."""

import hashlib
import itertools
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from train.start.provenance import code_versions

DEFAULT_RUN_DIR = "runs/train"
INDEX, MIXTURE = "index.json", "mixture.json"
PROBE_BYTES = 2**20
LEAST_FREE_GPU_MEMORY = 0.9
"""Fraction of a GPU's memory that must be free."""
NVIDIA = "0x10de"
"""Vendor number on the PCI bus."""


def local_problems(min_free_gib: float) -> Iterator[str]:
    """Yield the problems of this node: too little free memory, or GPUs that do not respond."""
    import psutil
    import torch

    from stu.common.machine import allowed_bytes

    free_gib = min(psutil.virtual_memory().available, allowed_bytes()) / 2**30
    if free_gib < min_free_gib:
        yield f"{free_gib:.1f} GiB of memory are free, but {min_free_gib:g} are needed"
    num_gpus = len(list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))))
    # Without GPUs, the numbers that SLURM assigns mean nothing, and the run is for the CPU.
    if num_gpus and _has_nvidia_gpus() and torch.cuda.device_count() != num_gpus:
        yield f"{torch.cuda.device_count()} of {num_gpus} GPUs that SLURM assigned respond"
    for number in range(torch.cuda.device_count() if num_gpus else 0):
        try:
            free, total = torch.cuda.mem_get_info(number)
        except RuntimeError as error:  # such as memory with errors that cannot be corrected
            reason, *_ = str(error).split("\n")
            yield f"GPU {number} does not respond ({reason})"
            continue
        if free < LEAST_FREE_GPU_MEMORY * total:
            yield f"GPU {number} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def folder_problem(folder: Path, first_probe: str, probe: str) -> str:
    """Return what is wrong with a folder that nodes must share, or an empty string.

    Writes the file `probe`, and looks for `first_probe`, which the first node has written unless it
    is empty. The first node leaves its file for the others to see.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / probe).open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        is_seen = not first_probe or (folder / first_probe).exists()
        if probe != first_probe:
            (folder / probe).unlink()
    except OSError as error:
        return f"{folder} cannot be written ({error})"
    if is_seen:
        return ""
    return (
        f"{folder} does not show what the first node wrote there: it must be on a file system that "
        "all nodes share"
    )


def probe_name() -> str:
    """Return the name of the file that this process writes to test folders."""
    return f".stu-health-{socket.gethostname()}-{os.getpid()}"


def facts_of_node(data_dir: Path | None) -> dict[str, str]:
    """Return what all nodes must have in common: versions, and the indexes of the data."""
    facts = code_versions()
    if data_dir is None:
        return facts
    is_mixture = (data_dir / MIXTURE).exists()
    files = [data_dir / MIXTURE, *sorted(data_dir.glob(f"*/{INDEX}"))]
    for file in files if is_mixture else [data_dir / INDEX]:
        try:
            found = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        except OSError as error:
            found = f"not there ({error.strerror})"
        facts[f"the hash of {file}"] = found
    return facts


def folders_of(settings: Sequence[str]) -> tuple[Path, Path | None]:
    """Return `run_dir` and `data.dir` from settings of stu-train.

    They are read without the parser of stu-train, and errors are left to stu-plan to report.
    """
    import yaml

    run_dir, data_dir = DEFAULT_RUN_DIR, None
    words = [part for setting in settings for part in _name_and_value(setting)]
    for name, value in itertools.pairwise(words):
        if name == "--run-dir":
            run_dir = value
        elif name == "--data.dir":
            data_dir = value
        elif name == "--config":
            try:
                contents = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                continue
            if isinstance(contents, dict):
                data = contents.get("data")
                run_dir = contents.get("run_dir") or run_dir
                data_dir = (data.get("dir") if isinstance(data, dict) else None) or data_dir
    return Path(str(run_dir)), None if data_dir is None else Path(str(data_dir))


def _name_and_value(setting: str) -> list[str]:
    name, is_joined, value = setting.partition("=")
    return [name, value] if is_joined and setting.startswith("--") else [setting]


def _has_nvidia_gpus() -> bool:
    """Return whether there are NVIDIA devices on the PCI bus, even if the driver finds none."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == NVIDIA for vendor in vendors)
