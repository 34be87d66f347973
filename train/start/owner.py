"""Who trains in a run's folder: one job at a time.

    RUN_DIR/jobs/00001.json    the first job: where and what it runs, and how it ended
    RUN_DIR/jobs/00002.json    the next one. The job with the highest number owns the folder

A job creates its own file, which fails if another was faster, on network file systems too. The
file's modification time is the owner's heartbeat, set by the file system's clock. So no lock is
needed that a killed process would leave, or that a file server would have to support.
"""

import errno
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stu.common.files import fsync, new_file

FOLDER = "jobs"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""How long the heartbeat of an owner that is gone without a word is waited for."""
WATCH_SECONDS = 3 * BEAT_SECONDS
"""The least time that an owner is watched, however old its heartbeat looks."""
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class TakenOver(OSError):
    """The folder of this run belongs to another job by now."""


class RunOwner:
    """This job's record in `run_dir`, from `claim` to `end`. Kept by the first rank."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / FOLDER
        self._run_dir = run_dir
        self._number = 0
        self._record: dict[str, Any] = {}
        self._ended = threading.Event()
        self._made: list[Path] = []
        self.is_lost = False
        """Whether another job has taken the folder over."""

    @property
    def number(self) -> int:
        """This job's number in the folder, from 1."""
        return self._number

    def claim(self, details: dict[str, Any]) -> None:
        """Own the folder from now on. details: what else the record is to say.

        A job that ended, is gone from this machine, or was requeued by Slurm and starts again is
        followed at once; another one after it has shown no sign of life for `STALE_SECONDS`.
        Raises ValueError if one is alive, OSError if the folder cannot be written.
        """
        self._made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._record = {**_this_process(), **details, "ended": None}
        while True:
            newest = self._newest()
            if newest and not self._follows(newest):
                continue  # it changed while it was looked at
            if self._create(newest + 1):
                break
        self._number = newest + 1
        threading.Thread(target=self._beat, daemon=True, name="owner").start()

    def note(self, **details: Any) -> None:
        """Add to the record."""
        self._record |= details
        self._write()

    def is_still(self) -> bool:
        """Find out at once whether the folder is still this job's."""
        if not self._path(self._number).exists() or self._newest() > self._number:
            self.is_lost = True
        return not self.is_lost

    def look(self) -> None:
        """Raise TakenOver if the folder is not this job's any more."""
        if not self.is_still():
            raise self.taken_over()

    def taken_over(self) -> TakenOver:
        """The error that ends this run."""
        newest, own = self._newest(), self._path(self._number)
        if newest <= self._number:
            return TakenOver(f"{own}: this run's record is gone; it stops without a checkpoint")
        return TakenOver(
            f"run_dir={self._run_dir}: {_describe(_read(self._path(newest)))} has taken over, for "
            f"this run ({own.name}) had shown no sign of life; it stops without a checkpoint"
        )

    def end(self, how: str) -> None:
        """Give the folder free for the next job. Tell, and do not raise, if that cannot be written:
        the error that a run ends with, such as a full disk, counts more."""
        self._ended.set()
        try:
            if not self.is_lost and self._path(self._number).exists():
                self.note(ended={"how": how, "time": _now()})
        except OSError as error:
            _say(f"{self._path(self._number)} could not be written ({error})")

    def withdraw(self) -> None:
        """Leave nothing of a job that did not begin."""
        self._ended.set()
        try:
            self._path(self._number).unlink(missing_ok=True)
        except OSError as error:
            _say(f"{self._path(self._number)} could not be deleted ({error})")
        with suppress(OSError):  # not empty: another job's
            for path in self._made:
                path.rmdir()

    def _follows(self, number: int) -> bool:
        """Whether the owner is gone, so that this job may follow it; False if another one came."""
        path = self._path(number)
        owner = _read(path)
        if owner.get("ended"):
            return True
        if _is_same_job_before(owner, self._record):
            _say(f"takes over from {_describe(owner)}: Slurm has started that job again")
            return True
        on_this_machine = self._record["boot"] is not None and all(
            owner.get(name) == self._record[name] for name in ("boot", "space")
        )
        if on_this_machine and _is_gone(owner["pid"], owner["start"]):
            _say(f"takes over from {_describe(owner)}: its process is gone")
            return True
        beat, age = self._beat_and_age(path)
        if on_this_machine and age < WATCH_SECONDS:
            raise self._refusal(owner, age)
        # A heartbeat from the future, where clocks differ, is not waited for any longer.
        patience = min(max(WATCH_SECONDS, STALE_SECONDS - age), STALE_SECONDS)
        _say(
            f"waits up to {patience:.0f} s for a sign of life of {_describe(owner)}, which has "
            f"not ended and owns {self._run_dir}"
        )
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT_SECONDS / 5))
            if self._newest() != number or _read(path).get("ended"):
                return False
            latest, age = self._beat_and_age(path)
            if latest != beat:
                raise self._refusal(owner, age)
        _say(f"takes over from {_describe(owner)}: no sign of life for {age:.0f} s")
        return True

    def _refusal(self, owner: dict[str, Any], age: float) -> ValueError:
        return ValueError(
            f"run_dir={self._run_dir}: {_describe(owner)} trains there, and was alive "
            f"{max(0.0, age):.0f} s ago: wait until it has ended, stop it, or choose another "
            "run_dir"
        )

    def _beat_and_age(self, path: Path) -> tuple[int, float]:
        """The time of the last heartbeat and the seconds since, by the file system's clock."""
        probe = self._folder / f".now-{uuid.uuid4().hex[:8]}"
        probe.touch()
        now = probe.stat().st_mtime_ns
        probe.unlink()
        try:
            with path.open("rb") as file:  # opening asks the file server, and no cache
                beat = os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:  # withdrawn
            beat = 0
        return beat, (now - beat) / 1e9

    def _create(self, number: int) -> bool:
        """Make the record, whole; False if another job was faster."""
        path = self._path(number)
        temporary = self._folder / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
        temporary.write_text(json.dumps(self._record, indent=1) + "\n", encoding="utf-8")
        fsync(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            # A server's answer can get lost, and the question be asked again.
            return temporary.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                return False
            self._number = number
            self._write()
        finally:
            temporary.unlink()
        fsync(self._folder)
        return True

    def _write(self) -> None:
        with new_file(self._path(self._number)) as temporary:
            temporary.write_text(json.dumps(self._record, indent=1) + "\n", encoding="utf-8")

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._beat_once()

    def _beat_once(self) -> None:
        try:
            os.utime(self._path(self._number))
            self.is_lost |= self._newest() > self._number
        except FileNotFoundError:
            self.is_lost = not self._ended.is_set()
        except OSError as error:  # the next checkpoint says so if it lasts
            _say(f"heartbeat in {self._folder} could not be written ({error})")

    def _newest(self) -> int:
        numbers = [int(path.stem) for path in self._folder.glob("*.json") if path.stem.isdigit()]
        return max(numbers, default=0)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.json"


def _this_process() -> dict[str, Any]:
    """Identify this process among all others, with Slurm's names for it."""
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
        "began": _now(),
    }


def _is_same_job_before(owner: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether Slurm ended `owner` before it started this process under the same number."""
    before, now = owner.get("slurm"), own["slurm"]
    if not before or not now:
        return False
    is_same = (before["cluster"], before["job"]) == (now["cluster"], now["job"])
    return is_same and bool(before["restart"] < now["restart"])


def _is_gone(pid: int, start: str | None) -> bool:
    """Whether the process with this number that began at `start` is not there any more."""
    found = _start_of(pid)
    if found is None:  # or it is another user's, and `/proc` hides those (hidepid)
        try:
            os.kill(pid, 0)
        except PermissionError:
            return False
        except ProcessLookupError:
            return True
    return found != start


def _start_of(pid: int) -> str | None:
    """When a process was started, in ticks since the machine was; None if there is none."""
    status = _contents(f"/proc/{pid}/stat")
    if status is None:
        return None
    state, *fields = status.rpartition(")")[2].split()  # the name before may hold anything
    return None if state in "ZX" else fields[18]


def _read(path: Path) -> dict[str, Any]:
    """A record; without contents if it is not whole or gone."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "a job without a name"
    job = f"Slurm job {owner['slurm']['job']}, " if owner.get("slurm") else ""
    return f"process {owner['pid']} on {owner['host']} ({job}since {owner['began']})"


def _contents(path: str) -> str | None:
    return _or_none(lambda: Path(path).read_text(encoding="utf-8", errors="replace").strip())


def _link(path: str) -> str | None:
    return _or_none(lambda: os.readlink(path))


def _or_none(read: Callable[[], str]) -> str | None:
    try:
        return read()
    except OSError:  # not on this system
        return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _say(message: str) -> None:
    print(f"stu-train: {message}", file=sys.stderr, flush=True)
