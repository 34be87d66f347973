"""Ownership of a run's folder: one job at a time trains in it.

    RUN_DIR/jobs/00001.json    record of the first job: where and what it runs, and how it ended
    RUN_DIR/jobs/00002.json    record of the next one; the highest number owns the folder

Creating the file of a number that another job has taken fails, on network file systems too. The
file's modification time, by the file system's clock, is the owner's heartbeat. So there is no lock
that a killed process would leave behind, or that a file server would have to support.
"""

import errno
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stu.common.errors import UserError
from stu.common.files import fsync, new_file
from train.start.processes import is_gone, is_same_job_before, this_process

FOLDER = "jobs"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""Time without a heartbeat after which an owner counts as gone."""
WATCH_SECONDS = 3 * BEAT_SECONDS
"""Least time for which an owner is watched, however old its heartbeat looks."""
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class TakenOver(OSError):
    """Loss of the run's folder to another job."""


class RunOwner:
    """This job's ownership of `run_dir`, from `claim` to `end`; on the first rank only."""

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
        """Number of this job in the folder, from 1."""
        return self._number

    def claim(self, details: dict[str, Any]) -> None:
        """Take ownership of the folder.

        An owner that ended, is gone from this machine, or is an earlier start of this Slurm job is
        followed at once; any other after it has shown no sign of life for `STALE_SECONDS`.

        details: further entries of the record. Raises UserError if the owner is alive, OSError if
        the folder cannot be written.
        """
        self._made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._record = {**this_process(), "began": _now(), **details, "ended": None}
        while True:
            newest = self._newest()
            if newest and not self._follows(newest):
                continue  # another job came meanwhile
            if self._create(newest + 1):
                break
        self._number = newest + 1
        threading.Thread(target=self._beat, daemon=True, name="owner").start()

    def note(self, **details: Any) -> None:
        """Add entries to the record."""
        self._record |= details
        self._write()

    def is_still(self) -> bool:
        """Look whether this job still owns the folder."""
        if not self._path(self._number).exists() or self._newest() > self._number:
            self.is_lost = True
        return not self.is_lost

    def look(self) -> None:
        """Raise TakenOver if this job no longer owns the folder."""
        if not self.is_still():
            raise self.taken_over()

    def taken_over(self) -> TakenOver:
        """Return the error that ends this run."""
        newest, own = self._newest(), self._path(self._number)
        if newest <= self._number:
            return TakenOver(f"{own}: this run's record is gone; it stops without a checkpoint")
        return TakenOver(
            f"--run-dir {self._run_dir}: {_describe(_read(self._path(newest)))} has taken over, "
            f"as this run ({own.name}) had shown no sign of life; it stops without a checkpoint"
        )

    def end(self, how: str) -> None:
        """Release the folder for the next job, and record how this one ended.

        A failed write is printed and not raised: the error that ended the run matters more.
        """
        self._ended.set()
        try:
            if not self.is_lost and self._path(self._number).exists():
                self.note(ended={"how": how, "time": _now()})
        except OSError as error:
            _say(f"{self._path(self._number)} could not be written ({error})")

    def withdraw(self) -> None:
        """Remove all traces of a job that did not begin."""
        self._ended.set()
        try:
            self._path(self._number).unlink(missing_ok=True)
        except OSError as error:
            _say(f"{self._path(self._number)} could not be deleted ({error})")
        with suppress(OSError):  # another job has files there
            for path in self._made:
                path.rmdir()

    def _follows(self, number: int) -> bool:
        """Wait until the owner is gone. Return False if another job came meanwhile; raise UserError
        if the owner is alive."""
        path = self._path(number)
        owner = _read(path)
        if owner.get("ended"):
            return True
        if is_same_job_before(owner, self._record):
            _say(f"takes over from {_describe(owner)}: Slurm has started that job again")
            return True
        on_this_machine = self._record["boot"] is not None and all(
            owner.get(name) == self._record[name] for name in ("boot", "space")
        )
        if on_this_machine and is_gone(owner["pid"], owner["start"]):
            _say(f"takes over from {_describe(owner)}: its process is gone")
            return True
        beat, age = self._beat_and_age(path)
        if on_this_machine and age < WATCH_SECONDS:
            raise self._refusal(owner, age)
        # A heartbeat from the future, where clocks differ, is not waited for longer than others.
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

    def _refusal(self, owner: dict[str, Any], age: float) -> UserError:
        return UserError(
            "run_dir",
            self._run_dir,
            message=f"--run-dir {self._run_dir}: {_describe(owner)} trains there, and was alive "
            f"{max(0.0, age):.0f} s ago: wait until it has ended, stop it, or choose another "
            "folder",
        )

    def _beat_and_age(self, path: Path) -> tuple[int, float]:
        """Return the time of the last heartbeat and its age, by the file system's clock."""
        probe = self._folder / f".now-{uuid.uuid4().hex[:8]}"
        probe.touch()
        now = probe.stat().st_mtime_ns
        probe.unlink()
        try:
            with path.open("rb") as file:  # opening asks the file server, not a cache
                beat = os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:  # withdrawn
            beat = 0
        return beat, (now - beat) / 1e9

    def _create(self, number: int) -> bool:
        """Create the record, complete. Return False if another job was faster."""
        path = self._path(number)
        temporary = self._folder / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
        temporary.write_text(json.dumps(self._record, indent=1) + "\n", encoding="utf-8")
        fsync(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            # The file server's answer may have been lost, and the request repeated.
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


@contextmanager
def owned(owner: RunOwner | None) -> Iterator[None]:
    """Release the run's folder when the block ends, and record how it ended."""
    how = "done"
    try:
        yield
    except BaseException as error:
        how = f"{type(error).__name__}: {error}"
        raise
    finally:
        if owner is not None:
            owner.end(how)


def _read(path: Path) -> dict[str, Any]:
    """Return a record; an empty one if the file is gone or incomplete."""
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


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _say(message: str) -> None:
    print(f"stu-train: {message}", file=sys.stderr, flush=True)
