"""Free memory of the machine, within the limit of this process's control group."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil


class _Version(NamedTuple):
    """Where a version of Linux's control groups says what they use."""

    prefix: str
    """Beginning of this process's line in OWN_GROUPS."""
    root: str
    limit: str
    used: str
    cache: str
    """Name of the bytes of files that the system can drop."""


OWN_GROUPS = Path("/proc/self/cgroup")
VERSIONS = [
    _Version("0::", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    _Version(
        ":memory:",
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
]
"""Versions 2 and 1."""


def available_bytes(root: Path = Path("/")) -> int:
    """Return the bytes that this process can still take: of the machine's memory, and of what
    containers and Slurm allow its control group or one that contains it.

    root: Folder of the file system; for tests.
    """
    available: int = psutil.virtual_memory().available
    return min([available, *_free_in_groups(root)])


def _free_in_groups(root: Path) -> Iterator[int]:
    try:
        lines = (root / OWN_GROUPS.relative_to("/")).read_text().splitlines()
    except OSError:  # not Linux
        return
    for version in VERSIONS:
        for line in lines:
            if version.prefix not in line:
                continue
            own = PurePosixPath(line.partition(version.prefix)[2])
            # A container may see its own group as the root of all.
            for group in (own, *own.parents):
                folder = root / version.root / group.relative_to("/")
                with suppress(OSError, ValueError, KeyError):  # no such group, or no limit
                    limit = int((folder / version.limit).read_text())
                    used = int((folder / version.used).read_text())
                    rows = (folder / "memory.stat").read_text().splitlines()
                    statistics = dict(row.split() for row in rows)
                    yield max(0, limit - used + int(statistics[version.cache]))
