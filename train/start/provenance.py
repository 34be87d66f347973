"""Where a run's results come from: code, versions, host and command line."""

import contextlib
import hashlib
import platform
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import stu
import train

PACKAGES = ("torch", "lightning", "deepspeed", "numpy", "safetensors")


def provenance(arguments: Sequence[str]) -> dict[str, Any]:
    """Return commit, versions, host and command line as plain values."""
    return {
        "commit": git_commit(Path(__file__).parent),
        "versions": {"python": platform.python_version(), **_versions()},
        "host": socket.gethostname(),
        "command": shlex.join(["stu-train", *arguments]),
    }


def code_versions() -> dict[str, str]:
    """Return the versions that a run's code consists of, and a hash of stu's own code."""
    code = hashlib.sha256()
    for package in (stu, train):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            code.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return {
        "python": platform.python_version(),
        **_versions(),
        "the code of stu": code.hexdigest()[:16],
    }


def changes_since(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return differences between two results of `provenance` that may change a run's results."""
    pairs = [("commit", before.get("commit"), now["commit"])]
    versions = before.get("versions", {})
    pairs += [(name, versions.get(name), value) for name, value in now["versions"].items()]
    return [f"{name} {was} then, {value} now" for name, was, value in pairs if was != value]


def git_commit(folder: Path) -> str | None:
    """Return the commit that `folder` is checked out from, marked if files were changed since; None
    outside of a checkout."""
    file = Path(__file__).name if folder == Path(__file__).parent else "."
    # A folder can lie in a checkout of something else, as a virtual environment often does.
    if _git(folder, "ls-files", "--error-unmatch", file) is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":/*.py")
    return f"{commit} with changes" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of git, or None if it fails."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or another user's
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    installed = {}
    for name in ("stu", *PACKAGES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed
