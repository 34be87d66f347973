"""Agreement of all ranks on a run's start: if one refuses it, all do, with the same exit code.

Ranks meet in a key-value store (torch's TCPStore) that the first rank, or torchrun, serves. Each
block of `Start.together` is a round, numbered from 1:

1. Each rank runs the block, and stores its answer under `ROUND/RANK`: a message if it refuses or
   fails, else facts that must be equal everywhere. The first rank counts up `beats` meanwhile.
2. The first rank reads all answers and stores the verdict under `ROUND/verdict`.
3. Each rank reads the verdict and stores `ROUND/read/RANK`. The first rank waits for these, since
   the store ends with its process; then all continue, or all raise the same error.

Waiting is polling, so that signals are handled. It ends after `PATIENCE_SECONDS` without a value
and, for the other ranks, without a beat of the first one.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from stu.common.errors import UserError
from train.start.launch import Launch

PATIENCE_SECONDS = 600.0
"""Time that ranks wait for one another, for slow file systems and large models."""
SHARED_PREFIX = "STU_TRAIN_"
"""Prefix of environment variables that pass values to the ranks that Lightning starts later."""
BEATS, BEAT_SECONDS = "beats", 10.0
"""Counter by which the other ranks see that the first one is still at work."""
SHOWN_GROUPS = 4


class ParseError(SystemExit):
    """Arguments that the parser refused, with a message that it has printed."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


class RunFailed(SystemExit):
    """A failure of another rank before training, which the user's settings did not cause."""

    def __init__(self, message: str) -> None:
        print(f"stu-train: {message}", file=sys.stderr, flush=True)
        super().__init__(1)


class Start:
    """Exchange among the ranks of a run before training, without a process group."""

    def __init__(self, launch: Launch, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._launch, self._patience = launch, patience_seconds
        self._round = 0
        self._store: Any = None

    @contextmanager
    def together(self) -> Iterator[dict[str, str]]:
        """Run the block on all ranks, and yield a dictionary for what must be the same everywhere.

        Raises UserError on every rank if one of them raised UserError or OSError, or if the
        dictionaries differ, and RunFailed if one raised anything else. The other ranks wait while
        the first one is at work.
        """
        facts: dict[str, str] = {}
        try:
            with self._showing_work():
                yield facts
        except (UserError, OSError, ParseError) as error:
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
        """Raise UserError on all ranks unless all nodes see and can write the same `folder`."""
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

    def share(self, name: str, value: str) -> None:
        """Pass a value from the first rank to the others, including those that start later."""
        os.environ[SHARED_PREFIX + name.upper()] = value
        if self._launch.num_ranks > 1:
            self._connect().set(f"shared/{name}", value)

    def shared(self, name: str) -> str | None:
        """Return the value that the first rank shared; None if there is no way to ask it."""
        if self._launch.num_ranks > 1:
            return self._get(f"shared/{name}", 0)
        return os.environ.get(SHARED_PREFIX + name.upper())

    def _agree(self, answer: dict[str, Any], is_raised: bool = True) -> None:
        """Send this rank's answer to the first rank, and follow its verdict.

        is_raised: whether a verdict against the run is raised here; otherwise the caller raises.
        """
        self._round += 1
        rank, count, store = self._launch.rank, self._launch.num_ranks, self._connect()
        answer["host"] = socket.gethostname()
        store.set(f"{self._round}/{rank}", json.dumps(answer))
        if rank == 0:
            answers = [
                json.loads(self._get(f"{self._round}/{other}", other)) for other in range(count)
            ]
            store.set(f"{self._round}/verdict", json.dumps(judge(answers)))
        verdict = json.loads(self._get(f"{self._round}/verdict", 0))
        store.set(f"{self._round}/read/{rank}", "")
        if rank == 0:  # the store ends with this process
            for other in range(count):
                self._get(f"{self._round}/read/{other}", other, 10.0 if verdict else None)
        if verdict and is_raised:
            if "refuses" in verdict:
                raise UserError(message=verdict["refuses"])
            raise RunFailed(verdict["fails"])

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

    def _get(self, key: str, rank: int, patience_seconds: float | None = None) -> str:
        """Return a value once it is there. Unlike in the store's own wait, signals are handled.

        rank: The one that sets it.
        """
        patience = patience_seconds or self._patience
        deadline, beats = time.monotonic() + patience, 0
        pause = 0.01
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                seen = beats if self._launch.rank == 0 else self._store.add(BEATS, 0)
                if seen == beats:
                    raise RunFailed(
                        f"rank {self._launch.rank} on {socket.gethostname()} had no word from "
                        f"rank {rank} in {patience:g} seconds"
                    )
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
    """Return the verdict on the answers of all ranks: empty if training may begin, else the message
    under `refuses` (the user's to mend) or `fails`."""
    for kind in ("refuses", "fails"):
        groups: dict[str, list[int]] = {}
        for rank, answer in enumerate(answers):
            if kind in answer:
                groups.setdefault(answer[kind], []).append(rank)
        if len(groups) == 1 and len(*groups.values()) == len(answers):
            return {kind: f"{next(iter(groups))} (all {len(answers)} ranks)"}
        if groups:
            parts = [f"{_names(ranks, answers)}: {text}" for text, ranks in groups.items()]
            more = f"; and {len(parts) - SHOWN_GROUPS} more" * (len(parts) > SHOWN_GROUPS)
            return {kind: "; ".join(parts[:SHOWN_GROUPS]) + more}
    first = answers[0]["facts"]
    for rank, answer in enumerate(answers):
        for name in first.keys() | answer["facts"].keys():
            here, there = (facts.get(name, "none") for facts in (first, answer["facts"]))
            if here != there:
                return {
                    "refuses": f"{name} is {here} for {_names([0], answers)}, and {there} for "
                    f"{_names([rank], answers)}: all ranks of a run must have the same"
                }
    return {}


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings by their dotted names."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif not name.startswith("__"):
            flat[prefix + name] = str(value)
    return flat


def wait_for_listener(host: str, port: int, patience_seconds: float) -> None:
    """Return once a process listens at the address. Raises RunFailed if none does in time."""
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


def _names(ranks: list[int], answers: list[dict[str, Any]]) -> str:
    shown = ", ".join(f"{rank} on {answers[rank]['host']}" for rank in ranks[:SHOWN_GROUPS])
    return f"rank{'s' * (len(ranks) > 1)} {shown}{', ..' * (len(ranks) > SHOWN_GROUPS)}"


def _check_seen(folder: Path, path: Path) -> None:
    """Raise UserError unless this node sees what the first one wrote, and can write there too."""
    try:
        is_seen = path.exists()
        probe = folder / f".start-{socket.gethostname()}-{os.getpid()}"
        if is_seen:
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise UserError(
            "run_dir", folder, message=f"--run-dir {folder} cannot be written ({error})"
        ) from error
    if not is_seen:
        raise UserError(
            "run_dir",
            folder,
            message=f"--run-dir {folder} does not show what the first rank wrote there: choose a "
            "folder on a file system that all nodes share",
        )
