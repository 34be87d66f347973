"""Where a run's results come from: its code, what that stands on, and how it was called."""

import platform
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "lightning", "deepspeed", "numpy", "safetensors")


def provenance(arguments: Sequence[str]) -> dict[str, Any]:
    """Return commit, versions, host and command line as plain values."""
    versions = {"stu": _version("stu"), "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    return {
        "commit": git_commit(Path(__file__).parent),
        "versions": versions,
        "host": socket.gethostname(),
        "command": shlex.join(["stu-train", *arguments]),
    }


def changes_since(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what may make results differ between two places where a run was trained."""
    pairs = [("commit", before.get("commit"), now["commit"])]
    versions = before.get("versions", {})
    pairs += [(name, versions.get(name), value) for name, value in now["versions"].items()]
    return [f"{name} {was} then, {value} now" for name, was, value in pairs if was != value]


def git_commit(folder: Path) -> str | None:
    """Return the commit that `folder` is checked out from, marked if its files were changed since;
    None if it is not part of a checkout."""
    file = Path(__file__).name if folder == Path(__file__).parent else "."
    # A folder can lie in a checkout of something else, as a virtual environment often does.
    if _git(folder, "ls-files", "--error-unmatch", file) is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":/*.py")
    return f"{commit} with changes" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    """The answer of git; None if there is none."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or another user's
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
