"""The rows of a batch on disk: none is lost, doubled or half there, however a run ends."""

import errno
import fcntl
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from stu.common.errors import show
from stu.common.files import new_file

SPOILT = "spoilt"
"""In a job file: why its output must not be gone on with."""
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


class OutputFile:
    """Lines that are on disk once they are appended; as a context, this run's alone.

    Beside it lies a job file with `identity`, what decides its rows. An output that was begun with
    the same is gone on with: a last line that was cut off in the middle is removed, and the numbers
    of the others are in `done`.

    recognise: the number of a row that was written, and whether it is one of an error; it raises
    KeyError, TypeError or ValueError for what is no such row.

    Raises ValueError if another run writes to it, or if it has rows of another identity or none and
    `overwrite` is off.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        recognise: Callable[[dict[str, Any]], tuple[int, bool]],
        overwrite: bool = False,
    ) -> None:
        self.done: set[int] = set()
        self.num_failed = 0
        """Of the rows in `done`."""
        self._path, self._recognise = path, recognise
        self._identity = json.loads(json.dumps(identity))  # as it is once it was written
        self._job_file = _job_file(path)
        self._overwrite = overwrite

    def __enter__(self) -> "OutputFile":
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self._begin()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def append(self, lines: Sequence[str]) -> None:
        """Add lines, and return when they would outlast a crash of the machine."""
        data = "".join(line + "\n" for line in lines).encode()
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
            os.fsync(self._descriptor)
        except OSError as error:
            raise OSError(f"output {self._path}: {error.strerror}") from error

    def condemn(self, reason: str) -> None:
        """Let no run go on with these rows."""
        self._write_job({**self._identity, SPOILT: reason})

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"output {self._path}: another run is writing it; wait for that one, or choose "
                "another"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"output {self._path}: its file system has no locks; see to it that no other run "
                "writes it",
                file=sys.stderr,
            )

    def _begin(self) -> None:
        """Recover the rows that are there, or begin without any."""
        has_rows = os.fstat(self._descriptor).st_size > 0
        if has_rows and not self._overwrite:
            _require_same(self._path, self._old_identity(), self._identity)
            self._recover()
            return
        # Before the job file, so that no rows are ever taken for those of another job.
        os.ftruncate(self._descriptor, 0)
        os.fsync(self._descriptor)
        self._write_job(self._identity)

    def _write_job(self, values: Mapping[str, Any]) -> None:
        with new_file(self._job_file) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def _old_identity(self) -> Mapping[str, Any]:
        identity = _read_job(self._job_file)
        if identity is None:
            raise ValueError(
                f"output {self._path}: exists, and no {self._job_file.name} beside it says what it "
                "was begun with; choose another, or give --overwrite"
            )
        return identity

    def _recover(self) -> None:
        num_bytes = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # the run was killed while it wrote this one
                self._count(line, number)
                num_bytes += len(line)
        os.ftruncate(self._descriptor, num_bytes)

    def _count(self, line: bytes, line_number: int) -> None:
        place = f"output {self._path}: line {line_number}"
        try:
            number, is_failed = self._recognise(json.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{place} is no row of this job; mend or delete it, or give --overwrite"
            ) from error
        if number in self.done:
            raise ValueError(f"{place} has row {number} a second time; delete one of them")
        self.done.add(number)
        self.num_failed += is_failed


class StandardOutput:
    """Lines on standard output, where no other run's are. As a context: what else this process
    prints there goes to standard error."""

    done: frozenset[int] = frozenset()
    num_failed = 0

    def __enter__(self) -> "StandardOutput":
        sys.stdout.flush()
        self._descriptor = os.dup(1)
        os.dup2(2, 1)
        return self

    def append(self, lines: Sequence[str]) -> None:
        """Write lines."""
        data = "".join(line + "\n" for line in lines).encode()
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise OSError(f"standard output: {error.strerror}") from error

    def condemn(self, reason: str) -> None:
        """Nothing: no run goes on with these rows."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        sys.stdout.flush()
        os.dup2(self._descriptor, 1)
        os.close(self._descriptor)


def require_same_job(identity: Mapping[str, Any], others: Sequence[Path]) -> None:
    """Raises ValueError if one of the `others`, the outputs of the other tasks, has rows of
    another job: together they would be a mixture."""
    for other in others:
        if other.exists() and other.stat().st_size and (old := _read_job(_job_file(other))):
            _require_same(other, {**old, "part": None}, {**identity, "part": None})


def _job_file(output: Path) -> Path:
    return output.with_name(output.name + ".job.json")


def _read_job(file: Path) -> dict[str, Any] | None:
    """The settings that the output was begun with, if they were written."""
    try:
        identity = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(identity, dict):
        raise ValueError(f"{file}: a JSON object is needed")
    return identity


def _require_same(output: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises ValueError naming what differs."""
    if SPOILT in old:
        raise ValueError(f"output {output}: {old[SPOILT]}")
    different = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if different:
        was = ", ".join(f"{name}={show(old.get(name))}" for name in different)
        now = ", ".join(f"{name}={show(new.get(name))}" for name in different)
        raise ValueError(
            f"output {output}: was begun with {was}, and this run has {now}: run it as it was "
            "begun, choose another output, or begin anew with --overwrite"
        )
