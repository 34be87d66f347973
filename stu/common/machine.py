"""Memory and processors that a process may use, within the limits of its control group."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

GROUPS = "sys/fs/cgroup"
"""Folder of Linux's control groups, in which version 1 has a folder for each controller."""
FAST_PROCESSORS = "sysctl", "-n", "hw.perflevel0.physicalcpu"
"""Command that prints how many fast processors a Mac has."""


def allowed_bytes(root: Path = Path("/")) -> float:
    """Return the bytes that containers and Slurm still allow the control group of this process, and
    those around it; infinity where they set no limit.

    root: Folder of the file system; for tests.
    """
    return min(_free_in_groups(root), default=math.inf)


def num_processors(root: Path = Path("/")) -> int:
    """Return the processors that this process may use, of which a job or container may have fewer
    than the machine. Of a Mac they are the fast ones, as the others would be waited for.

    root: Folder of the file system; for tests.
    """
    if sys.platform == "linux":
        return min([len(os.sched_getaffinity(0)), *_processors_of_groups(root)])
    count = os.cpu_count() or 1
    if sys.platform == "darwin":
        with suppress(OSError, ValueError):  # one with processors of a single kind
            found = subprocess.run(FAST_PROCESSORS, capture_output=True, check=False)
            return int(found.stdout)
    return count


def limit_threads() -> None:
    """Let torch use no more threads than this process has processors, unless OMP_NUM_THREADS says
    how many."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), num_processors()))


def _free_in_groups(root: Path) -> Iterator[int]:
    new = "memory.max", "memory.current", ""
    old = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
    for version, folder in _groups("memory", root):
        limit, used, prefix = new if version == 2 else old
        with suppress(OSError, ValueError, KeyError):  # no such group, or no limit
            rows = (folder / "memory.stat").read_text().splitlines()
            statistics = dict(row.split() for row in rows)
            # The system drops contents of files where it needs their memory.
            files = (int(statistics[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
            taken = int((folder / used).read_text()) - sum(files)
            yield max(0, int((folder / limit).read_text()) - taken)


def _processors_of_groups(root: Path) -> Iterator[int]:
    for version, folder in _groups("cpu", root):
        with suppress(OSError, ValueError):  # no such group, or no limit
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
                quota, period = ((folder / name).read_text() for name in names)
            if int(quota) > 0:
                yield math.ceil(int(quota) / int(period))


def _groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Yield the version and the folder of this process's control group and of those around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        number, controllers, own = line.split(":", 2)
        if number == "0" and not controllers:
            version, top = 2, root / GROUPS
        elif controller in controllers.split(","):
            version, top = 1, root / GROUPS / controller
        else:
            continue
        # A container may see its own group as the root of all.
        for group in (PurePosixPath(own), *PurePosixPath(own).parents):
            yield version, top / group.relative_to("/")
