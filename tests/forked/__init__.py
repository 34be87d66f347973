"""A process that has imported everything and forks for each command that tests start.

Starting Python and importing torch and Lightning takes 3 to 9 seconds of a processor, and a fork of
a process that has them takes 20 ms. `python()` and `program(name)` are executables to use in place
of `sys.executable` and of a command: with the same arguments, environment, folder, limits and open
files, they do the same. What they start is started in this way too. Tests of the start itself use
the real ones. One server serves all workers of a pytest run, and ends with it.
"""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).parents[2]
FOLDER = "STU_TESTS_FORK_SERVER"
"""Environment variable: the folder of this run's server."""


def make_folder() -> None:
    """Make the folder for the server of this pytest run, which starts when first needed."""
    folder = Path(tempfile.mkdtemp(prefix="stu-tests-"))
    (folder / "bin").mkdir()
    (folder / "owner").write_text(str(os.getpid()))
    text = f"#!{sys.executable} -IS\n" + Path(__file__).with_name("client.py").read_text()
    for name in ("python", *entry_points()):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    os.environ[FOLDER] = str(folder)


def entry_points() -> list[str]:
    """Return the names of stu's commands; none where it is not installed, and only imported."""
    try:
        points = metadata.distribution("stu").entry_points
    except metadata.PackageNotFoundError:
        return []
    return [point.name for point in points.select(group="console_scripts")]


def remove_folder() -> None:
    """Remove the folder; the server ends with this process."""
    shutil.rmtree(os.environ.pop(FOLDER))


def program(name: str) -> str:
    """Return the path of a command, such as stu-train, that the server runs."""
    if torch.cuda.is_available():  # CUDA does not work in forks
        return str(Path(sys.executable).with_name(name))
    folder = Path(os.environ[FOLDER])
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "socket").exists():
            _start(folder)
    return str(folder / "bin" / name)


def python() -> str:
    """Return the path of the interpreter that the server runs."""
    return program("python")


def run(
    *command: object, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command, which computes on one thread, to its end, and return it with its output."""
    return subprocess.run(
        [*map(str, command)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


class Popen(subprocess.Popen):
    """`subprocess.Popen` of `python()` or of a `program`: signals go to the process itself."""

    @property
    def real(self) -> psutil.Process:
        """The process itself; `pid` is the client, which waits for it."""
        if not hasattr(self, "_real"):
            self._real = real(self.pid)
        return self._real

    def send_signal(self, sig: int) -> None:
        """Send a signal to the process itself, unless it has ended."""
        if self.poll() is None:
            try:
                self.real.send_signal(sig)
            except psutil.NoSuchProcess:
                self.wait()


def real(pid: int) -> psutil.Process:
    """Return the process that a client represents, or the process `pid` if it is no client."""
    folder = Path(os.environ[FOLDER])
    client = psutil.Process(pid)
    # A process that has just begun to execute its program has an empty command line.
    while not (words := client.cmdline()) or any(
        Path(word).parent == folder / "bin" for word in words[:3]
    ):
        if not words:
            time.sleep(0.002)
            continue
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(str(folder / "socket"))
            _send(server, {"client": pid})
            if answer := int(server.makefile("r").readline()):  # the server has forked it
                return psutil.Process(answer)
        time.sleep(0.002)
    return client


def _start(folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["MKL_NUM_THREADS"] = "1"
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked.server", folder],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    with server.stdout:
        assert server.stdout.readline() == b"ready\n", (folder / "log").read_text()


def _send(to: socket.socket, request: dict) -> None:
    body = json.dumps(request).encode()
    to.sendall(len(body).to_bytes(8, "big") + body)
