"""The process that forks: imports everything, then waits for requests at its socket."""

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import multiprocessing
import os
import pkgutil
import random
import resource
import runpy
import selectors
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from lightning.fabric.utilities import rank_zero

NAMESPACES = "mnt", "uts", "pid"
OTHERS = [
    "deepspeed.module_inject",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # it compiles a function, for seconds
    "fastapi",
    "lightning.pytorch",
    "lightning.pytorch.strategies.deepspeed",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "torch.utils.tensorboard",
    "uvicorn",
]
"""Imported by our modules, or by DeepSpeed, only when they are needed."""
NOT_FORKED = ("serve.evaluation.harness", "serve.ray.", "serve.ray_", "serve.batch.cluster")
"""Starts of the names of modules whose import starts threads."""


class Server:
    """Forks for each request on its socket, until the pytest run that it serves is over."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "new"))
        self._listener.listen(100)
        (folder / "new").rename(folder / "socket")
        self._clients: dict[int, int] = {}
        """Process number of each client to that of the process it represents."""
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        owner = os.pidfd_open(int((folder / "owner").read_text()))
        self._selector.register(owner, selectors.EVENT_READ, self._end)
        self._child: dict | None = None

    def run(self) -> dict:
        """Serve requests. In a forked process, return its request."""
        while self._child is None:
            for key, _ in self._selector.select():
                key.data()
                if self._child is not None:
                    break
        return self._child

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(60)
        try:
            head, descriptors, _, _ = socket.recv_fds(connection, 8, 253)
            request = json.loads(connection.makefile("rb").read(int.from_bytes(head, "big")))
        except (OSError, ValueError):  # the client was killed
            connection.close()
            return
        if "client" in request:
            with connection:
                connection.sendall(b"%d\n" % self._clients.get(request["client"], 0))
            return
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        client = struct.unpack("3i", credentials)[0]
        pid = os.fork()
        if pid == 0:
            for key in self._selector.get_map().values():
                if isinstance(key.fileobj, socket.socket):
                    key.fileobj.close()
            self._selector.close()
            self._child = {**request, "received": descriptors, "client": client}
            self._child["connection"] = connection
            return
        for descriptor in descriptors:
            os.close(descriptor)
        self._clients[client] = pid
        ended = os.pidfd_open(pid)

        def hang_up() -> None:
            self._selector.unregister(connection)
            os.kill(pid, signal.SIGKILL)

        def end() -> None:
            _, status = os.waitpid(pid, 0)
            del self._clients[client]
            self._selector.unregister(ended)
            os.close(ended)
            if connection in self._selector.get_map():
                self._selector.unregister(connection)
            with contextlib.suppress(OSError), connection:
                connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))

        self._selector.register(connection, selectors.EVENT_READ, hang_up)
        self._selector.register(ended, selectors.EVENT_READ, end)

    def _end(self) -> None:
        for pid in self._clients.values():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)  # where pytest was killed
        sys.exit()


def become(request: dict) -> None:
    """Give this process all that a new one would inherit from the client."""
    _take_descriptors(request)
    os.setsid()
    _enter_namespaces(request["client"])
    request["connection"].sendall(b"%d\n" % os.getpid())
    request["connection"].close()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.umask(request["umask"])
    os.chdir(request["folder"])
    for name, limits in request["limits"].items():
        resource.setrlimit(getattr(resource, name), limits)
    for name in request["ignored"]:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    sys.executable = request["executable"]
    multiprocessing.set_executable(sys.executable)
    tempfile.tempdir = None
    random.seed()
    numpy.random.seed()  # noqa: NPY002
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0
    if os.environ.get("PYTHONUNBUFFERED") or "-u" in request["options"]:
        sys.stdout.reconfigure(write_through=True)


def _take_descriptors(request: dict) -> None:
    """Open the client's files under the same numbers, and close all others."""
    numbers, connection = request["descriptors"], request["connection"]
    above = max([*numbers, 2]) + 1
    kept = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, above) for file in request["received"]]
    request["connection"] = socket.socket(
        fileno=fcntl.fcntl(connection, fcntl.F_DUPFD_CLOEXEC, above)
    )
    connection.detach()
    kept_open = {0, 1, 2, *kept, request["connection"].fileno()}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept_open:
            with contextlib.suppress(OSError):
                os.close(int(name))
    for number, descriptor in zip(numbers, kept, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _enter_namespaces(client: int) -> None:
    """Enter the namespaces of the client, such as those of a node of the tests' Slurm."""
    paths = {name: f"/proc/{client}/ns/{name}" for name in NAMESPACES}
    own = {name: f"/proc/self/ns/{name}" for name in NAMESPACES}
    if all(os.readlink(paths[name]) == os.readlink(own[name]) for name in NAMESPACES):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    opened = [os.open(path, os.O_RDONLY) for path in paths.values()]
    for descriptor in opened:
        if libc.setns(descriptor, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(descriptor)
    pid = os.fork()  # only a new process is in a namespace of process numbers
    if pid == 0:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        return
    os.closerange(0, 1000)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def execute(request: dict) -> None:
    """Run the client's arguments as the interpreter would."""
    first, *others = request["arguments"]
    is_safe = {"-I", "-P"} & {*request["options"]} or os.environ.get("PYTHONSAFEPATH")
    folder = {"-m": os.getcwd(), "-c": ""}.get(first, str(Path(first).resolve().parent))
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*([] if is_safe else [folder]), *paths, *sys.path[1:]]
    for path in paths:
        if (Path(path) / "sitecustomize.py").exists():
            runpy.run_path(f"{path}/sitecustomize.py")
    if first == "-m":
        name = others[0]
        sys.modules.pop(name, None)  # it runs as __main__, and may be imported once more
        sys.argv[:] = others
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif first == "-c":
        code, *sys.argv[1:] = others
        sys.argv[0] = "-c"
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), module.__dict__)
    else:
        sys.argv[:] = request["arguments"]
        runpy.run_path(first, run_name="__main__")


def finish(execute: Callable[[], None]) -> None:
    """End as the interpreter does, except for destroying all modules, which takes half a second."""
    code: object = 0
    try:
        execute()
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


def preload() -> None:
    """Import all modules that a process may need, without starting a thread."""
    torch.set_num_threads(1)
    for package in ("stu", "train", "serve"):
        module = importlib.import_module(package)
        for found in pkgutil.walk_packages(module.__path__, f"{package}."):
            is_left_out = found.name.startswith(NOT_FORKED) or found.name.endswith("__main__")
            if not is_left_out:
                importlib.import_module(found.name)
    for name in OTHERS:
        importlib.import_module(name)
    status = Path("/proc/self/status").read_text()
    assert "\nThreads:\t1\n" in status, status
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    preload()
    server = Server(Path(sys.argv[1]))
    os.write(1, b"ready\n")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    request = server.run()
    become(request)
    finish(lambda: execute(request))
