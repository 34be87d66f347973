"""The identity of a process: which machine, which start, which Slurm job."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """Return what identifies this process among all others, and its Slurm job."""
    slurm = {
        "cluster": os.environ.get("SLURM_CLUSTER_NAME", ""),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": _start_of(os.getpid()),
        "boot": _contents("/proc/sys/kernel/random/boot_id"),
        "space": _link("/proc/self/ns/pid"),
        "slurm": slurm if slurm["job"] else None,
    }


def is_same_job_before(owner: dict[str, Any], own: dict[str, Any]) -> bool:
    """Return whether `owner` is an earlier, ended start of this process's Slurm job."""
    before, now = owner.get("slurm"), own["slurm"]
    if not before or not now:
        return False
    is_same = (before["cluster"], before["job"]) == (now["cluster"], now["job"])
    return is_same and bool(before["restart"] < now["restart"])


def is_gone(pid: int, start: str | None) -> bool:
    """Return whether the process `pid` that began at `start` no longer exists."""
    found = _start_of(pid)
    if found is None:  # another user's process may be hidden in `/proc` (hidepid)
        try:
            os.kill(pid, 0)
        except PermissionError:
            return False
        except ProcessLookupError:
            return True
    return found != start


def _start_of(pid: int) -> str | None:
    """Return the start time of a process in ticks since boot; None if there is no such process."""
    status = _contents(f"/proc/{pid}/stat")
    if status is None:
        return None
    state, *fields = status.rpartition(")")[2].split()  # the name before it may contain anything
    return None if state in "ZX" else fields[18]


def _contents(path: str) -> str | None:
    return _or_none(lambda: Path(path).read_text(encoding="utf-8", errors="replace").strip())


def _link(path: str) -> str | None:
    return _or_none(lambda: os.readlink(path))


def _or_none(read: Callable[[], str]) -> str | None:
    try:
        return read()
    except OSError:  # not on this system
        return None
