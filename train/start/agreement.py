"""A start that one rank refuses is refused by all, at once and with one exit code."""

import hashlib
import json
import os
import platform
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import stu
import train

if TYPE_CHECKING:
    from train.start.launch import Launch

PATIENCE_SECONDS = 600.0
"""How long ranks may be apart, for slow file systems and large models."""
TOLD = "STU_TRAIN_"
"""Beginning of variables by which the first rank tells those that Lightning starts beside it."""
BEATS, BEAT_SECONDS = "beats", 10.0
"""How the first rank shows the others that it is at work."""
SHOWN_GROUPS = 4
DISCOVERY_PORTS = range(25_000, 32_000)
"""Beyond Lightning's own for Slurm jobs, and below those that the system hands out."""
PACKAGES = ("stu", "torch", "lightning", "deepspeed", "numpy", "safetensors")


class UserError(Exception):
    """Something that the user can mend, told in one message."""


class ParseError(SystemExit):
    """Arguments that cannot be parsed, which the parser has told already."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


class RunFailed(SystemExit):
    """Another rank failed before training: nothing that the user's settings are to blame for."""

    def __init__(self, message: str) -> None:
        print(f"stu-train: {message}", file=sys.stderr, flush=True)
        super().__init__(1)


class Start:
    """The ranks of a run until training begins, when no process group is there yet."""

    def __init__(self, launch: "Launch", patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._launch, self._patience = launch, patience_seconds
        self._round = 0
        self._store: Any = None

    @contextmanager
    def together(self) -> Iterator[dict[str, str]]:
        """Run the body on all ranks. Raises UserError on each of them where one of them refused
        (UserError, ValueError, OSError), and ends them all where one failed.

        The body may fill the dictionary with what must be the same everywhere. The first rank's may
        take any time, as it verifies a checkpoint: the others wait while it is at work.
        """
        facts: dict[str, str] = {}
        try:
            with self._showing_work():
                yield facts
        except (UserError, ValueError, OSError, ParseError) as error:
            message = error.message if isinstance(error, ParseError) else str(error)
            if self._launch.num_ranks > 1:
                self._agree({"refuses": " ".join(message.split())})
            raise
        except Exception as error:
            if self._launch.num_ranks > 1:
                self._agree({"fails": f"{type(error).__name__}: {error}"}, is_raised=False)
            raise
        if self._launch.num_ranks > 1:
            self._agree({"facts": facts})

    def check_folder(self, folder: Path) -> None:
        """Raise UserError on all ranks unless all nodes write and see one and the same `folder`."""
        if self._launch.num_ranks == 1:
            return
        token = secrets.token_hex(4)
        with self.together():
            if self._launch.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f".start-{token}").touch()
                self._connect().set("token", token)
        token = self._connect().get("token").decode()
        path = folder / f".start-{token}"
        try:
            with self.together():
                if self._launch.local_rank == 0:
                    _check_seen(folder, path)
        finally:
            if self._launch.rank == 0:
                path.unlink(missing_ok=True)

    def tell(self, name: str, value: str) -> None:
        """Tell the other ranks something, those that Lightning starts later too: by the first."""
        os.environ[TOLD + name.upper()] = value
        if self._launch.num_ranks > 1:
            self._connect().set(f"told/{name}", value)

    def told(self, name: str) -> str | None:
        """Return what the first rank told; None if it cannot be asked before training."""
        if self._launch.num_ranks > 1:
            return self._get(f"told/{name}")
        return os.environ.get(TOLD + name.upper())

    def _agree(self, answer: dict[str, Any], is_raised: bool = True) -> None:
        """Tell the first rank, and do as it says. is_raised: whether that may be an exception."""
        self._round += 1
        rank, count, store = self._launch.rank, self._launch.num_ranks, self._connect()
        answer["host"] = socket.gethostname()
        store.set(f"{self._round}/{rank}", json.dumps(answer))
        if rank == 0:
            answers = [json.loads(self._get(f"{self._round}/{other}")) for other in range(count)]
            store.set(f"{self._round}/verdict", json.dumps(judge(answers)))
        verdict = json.loads(self._get(f"{self._round}/verdict"))
        store.set(f"{self._round}/read/{rank}", "")
        if rank == 0:  # the store goes with it
            for other in range(count):
                self._get(f"{self._round}/read/{other}", 10.0 if verdict else None)
        if not verdict:
            return
        if is_raised:
            raise (
                UserError(verdict["refuses"])
                if "refuses" in verdict
                else RunFailed(verdict["fails"])
            )

    @contextmanager
    def _showing_work(self) -> Iterator[None]:
        """Count up in the store while the first rank is in the block."""
        if self._launch.num_ranks == 1 or self._launch.rank != 0:
            yield
            return
        store, ended = self._connect(), threading.Event()

        def count() -> None:
            while not ended.wait(BEAT_SECONDS):
                store.add(BEATS, 1)

        thread = threading.Thread(target=count, daemon=True, name="start")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _get(self, key: str, patience_seconds: float | None = None) -> str:
        """Return a value once it is there. Python acts on a signal meanwhile, which it would not
        in the store's own wait."""
        patience = patience_seconds or self._patience
        deadline, beats = time.monotonic() + patience, 0
        pause = 0.01
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                seen = beats if self._launch.rank == 0 else self._store.add(BEATS, 0)
                if seen == beats:
                    raise RunFailed(f"no word ({key}) of another rank in {patience:g} seconds")
                deadline, beats = time.monotonic() + patience, seen
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        value: str = self._store.get(key).decode()
        return value

    def _connect(self) -> Any:
        if self._store is not None:
            return self._store
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        host, port = self._launch.address()
        listens = self._launch.rank == 0 and not self._launch.has_store()
        if not listens:
            wait_for_listener(host, port, self._patience)
        store = TCPStore(
            host, port, None, listens, timedelta(seconds=self._patience), wait_for_workers=False
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(f"stu-train/{attempt}", store)
        return self._store


def judge(answers: list[dict[str, Any]]) -> dict[str, str]:
    """Return what all ranks are to do, given all their answers: nothing if they may go on."""
    for kind in ("refuses", "fails"):
        groups: dict[str, list[int]] = {}
        for rank, answer in enumerate(answers):
            if kind in answer:
                groups.setdefault(answer[kind], []).append(rank)
        if len(groups) == 1 and len(*groups.values()) == len(answers):
            return {kind: f"{next(iter(groups))} (all {len(answers)} ranks)"}
        if groups:
            told = [f"{_names(ranks, answers)}: {text}" for text, ranks in groups.items()]
            more = f"; and {len(told) - SHOWN_GROUPS} more" * (len(told) > SHOWN_GROUPS)
            return {kind: "; ".join(told[:SHOWN_GROUPS]) + more}
    first = answers[0]["facts"]
    for rank, answer in enumerate(answers):
        for name in first.keys() | answer["facts"].keys():
            here, there = (its.get(name, "none") for its in (first, answer["facts"]))
            if here != there:
                return {
                    "refuses": f"{name} is {here} for {_names([0], answers)}, and {there} for "
                    f"{_names([rank], answers)}: all ranks of a run must have the same"
                }
    return {}


def _names(ranks: list[int], answers: list[dict[str, Any]]) -> str:
    shown = ", ".join(f"{rank} on {answers[rank]['host']}" for rank in ranks[:SHOWN_GROUPS])
    return f"rank{'s' * (len(ranks) > 1)} {shown}{', ..' * (len(ranks) > SHOWN_GROUPS)}"


def discovery_port() -> int:
    """Return a port that all nodes of a Slurm job know."""
    job = int(os.environ.get("SLURM_JOB_ID", os.getpid()))
    return DISCOVERY_PORTS[job % len(DISCOVERY_PORTS)]


def versions() -> dict[str, str]:
    """Return what a run's code is made of: versions, and a hash of the code of stu itself."""
    found = {"python": platform.python_version()}
    installed = {its.name.lower(): its.version for its in metadata.distributions() if its.name}
    found |= {name: installed[name] for name in PACKAGES if name in installed}
    code = hashlib.sha256()
    for package in (stu, train):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            code.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    found["the code of stu"] = code.hexdigest()[:16]
    return found


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings by their dotted names."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif not name.startswith("__"):
            flat[prefix + name] = str(value)
    return flat


def _check_seen(folder: Path, path: Path) -> None:
    """Raise UserError unless this node sees what the first one wrote, and can write there too."""
    try:
        is_seen = path.exists()
        probe = folder / f".start-{socket.gethostname()}-{os.getpid()}"
        if is_seen:
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise UserError(f"run_dir={folder} cannot be written ({error})") from error
    if not is_seen:
        raise UserError(
            f"run_dir={folder} does not show what the first rank wrote there: choose a run_dir on "
            "a file system that all nodes share"
        )


def wait_for_listener(host: str, port: int, patience_seconds: float) -> None:
    """Return once a process listens there; end this one if none does in time."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"the first rank did not answer at {host}:{port} in {patience_seconds:g} "
                    f"seconds ({error})"
                ) from error
        time.sleep(0.1)
