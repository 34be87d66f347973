"""Output rows on disk, of which none is lost, doubled or cut off when a run ends early."""

import errno
import fcntl
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stu.common.errors import UserError, show
from stu.common.files import new_file

SPOILT = "spoilt"
"""Field of a job file with the reason why its output cannot be resumed."""
SLURM_JOB = "slurm_job"
"""Field of a job file with the Slurm job, or the array, whose run began the output."""
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}


class OutputFile:
    """A file of lines, locked by this run while the context is open.

    A job file beside it holds `identity`, which decides the rows. An output of the same identity is
    resumed: a last line that was cut off is removed, and `done` has the numbers of the others. With
    `overwrite` it begins anew, unless an earlier start of the same Slurm job began it.

    recognise: Function that returns the number of a written row and whether it has an error, and
    raises KeyError, TypeError or ValueError for anything else.

    Raises UserError if another run is writing the file, or if it has rows of another or an unknown
    identity and `overwrite` is off.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        recognise: Callable[[dict[str, Any]], tuple[int, bool]],
        overwrite: bool = False,
    ) -> None:
        self.done: set[int] = set()
        """Numbers of the rows that are written."""
        self.num_failed = 0
        """Rows in `done` that have an error."""
        self._path, self._recognise = path, recognise
        self._identity = json.loads(json.dumps(identity))  # as it will be read from the job file
        self._overwrite = overwrite
        self._slurm_job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID"))

    def __enter__(self) -> "OutputFile":
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self._begin()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def append(self, lines: Sequence[str]) -> None:
        """Append lines, and return when they would survive a crash of the machine."""
        _write_lines(self._descriptor, lines, f"output {self._path}", is_durable=True)

    def condemn(self, reason: str) -> None:
        """Record that no run may resume this output."""
        self._write_job({**self._identity, SPOILT: reason})

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                "output",
                message=f"output {self._path}: another run is writing it; wait for that run, or "
                "choose another output",
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"output {self._path}: its file system has no locks; make sure that no other run "
                "writes it",
                file=sys.stderr,
            )

    def _begin(self) -> None:
        has_rows = os.fstat(self._descriptor).st_size > 0
        if has_rows and not (self._overwrite and self._is_first_start()):
            _require_same(self._path, self._old_identity(), self._identity)
            self._recover()
            return
        # Before the job file, so that old rows are never taken for rows of the new job.
        os.ftruncate(self._descriptor, 0)
        os.fsync(self._descriptor)
        self._write_job(self._identity)

    def _is_first_start(self) -> bool:
        """Return whether no earlier start of this Slurm job began the output."""
        if not int(os.environ.get("SLURM_RESTART_COUNT") or 0):
            return True
        return (_read_values(_job_file(self._path)) or {}).get(SLURM_JOB) != self._slurm_job

    def _write_job(self, values: Mapping[str, Any]) -> None:
        # First, so that files without this line are alike (slurm/generate.sbatch).
        values = values if self._slurm_job is None else {SLURM_JOB: self._slurm_job, **values}
        with new_file(_job_file(self._path)) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def _old_identity(self) -> Mapping[str, Any]:
        identity = _read_job(_job_file(self._path))
        if identity is None:
            raise UserError(
                "output",
                message=f"output {self._path}: exists, and there is no {_job_file(self._path).name}"
                " that records how it was made; choose another output, or give --overwrite",
            )
        return identity

    def _recover(self) -> None:
        num_bytes = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # the run was killed while it wrote this line
                self._count(line, number)
                num_bytes += len(line)
        os.ftruncate(self._descriptor, num_bytes)

    def _count(self, line: bytes, line_number: int) -> None:
        place = f"output {self._path}: line {line_number}"
        try:
            number, is_failed = self._recognise(json.loads(line))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                "output",
                message=f"{place} is not a row of this job; mend or delete it, or give --overwrite",
            ) from error
        if number in self.done:
            raise UserError(
                "output", message=f"{place} has row {number} a second time; delete one of them"
            )
        self.done.add(number)
        self.num_failed += is_failed


class StandardOutput:
    """Standard output as a file of lines. While the context is open, everything else that this
    process prints there goes to standard error."""

    done: frozenset[int] = frozenset()
    num_failed = 0

    def __enter__(self) -> "StandardOutput":
        sys.stdout.flush()
        self._descriptor = os.dup(1)
        os.dup2(2, 1)
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        os.dup2(self._descriptor, 1)
        os.close(self._descriptor)

    def append(self, lines: Sequence[str]) -> None:
        """Write lines."""
        _write_lines(self._descriptor, lines, "standard output")

    def condemn(self, reason: str) -> None:
        """Do nothing: no run resumes standard output."""


def require_same_job(identity: Mapping[str, Any], others: Sequence[Path]) -> None:
    """Raise UserError if one of `others`, the outputs of the other array tasks, has rows of another
    job: they could not be put together."""
    for other in others:
        if other.exists() and other.stat().st_size and (old := _read_job(_job_file(other))):
            _require_same(other, {**old, "part": None}, {**identity, "part": None})


def _write_lines(
    descriptor: int, lines: Sequence[str], name: str, is_durable: bool = False
) -> None:
    data = "".join(line + "\n" for line in lines).encode()
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        if is_durable:
            os.fsync(descriptor)
    except OSError as error:
        raise OSError(f"{name}: {error.strerror}") from error


def _job_file(output: Path) -> Path:
    return output.with_name(output.name + ".job.json")


def _read_job(file: Path) -> dict[str, Any] | None:
    """Return the identity of the output that `file` is beside, or None if there is no such file."""
    values = _read_values(file)
    return values and {name: value for name, value in values.items() if name != SLURM_JOB}


def _read_values(file: Path) -> dict[str, Any] | None:
    try:
        identity = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError("output", message=f"{file}: is not JSON ({error})") from error
    if not isinstance(identity, dict):
        raise UserError("output", message=f"{file}: is not a JSON object")
    return identity


def _require_same(output: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if SPOILT in old:
        raise UserError("output", message=f"output {output}: {old[SPOILT]}")
    different = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if different:
        before = ", ".join(f"{name}={show(old.get(name))}" for name in different)
        now = ", ".join(f"{name}={show(new.get(name))}" for name in different)
        raise UserError(
            "output",
            message=f"output {output}: was begun with {before}, and this run has {now}; run it as "
            "it was begun, choose another output, or start anew with --overwrite",
        )
