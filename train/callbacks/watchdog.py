"""Detection of hangs, and a heartbeat file of the run."""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L

from stu.common.files import new_file
from train.callbacks.progress import warned

HUNG = 70
"""Exit code of a run that hung (sysexits' EX_SOFTWARE)."""
LOOK_SECONDS = 1.0
HEARTBEAT_SECONDS = 10.0
WRITE_SECONDS = 30.0


class Watchdog(L.Callback):
    """Callback that ends a rank that does nothing for `hang_minutes`.

    It writes the stacks of all threads into `RUN_DIR/stacks` first. Ranks wait for one another, so
    if one hangs, all end. The first rank also writes `RUN_DIR/heartbeat.json` every few
    seconds: step, Unix time, host and process.
    """

    def __init__(self, run_dir: Path, hang_minutes: float) -> None:
        self._run_dir, self._hang_seconds = run_dir, 60 * hang_minutes
        self._seen = self._written = 0.0
        self._rank = 0
        self._ended = threading.Event()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._rank, self._seen = trainer.global_rank, time.monotonic()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.note()
        if self._rank == 0 and self._seen - self._written >= HEARTBEAT_SECONDS:
            self._written = self._seen
            beat = {
                "step": trainer.global_step,
                "time": time.time(),
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
            path = self._run_dir / "heartbeat.json"
            with warned("the heartbeat"), new_file(path) as temporary:
                temporary.write_text(json.dumps(beat) + "\n", encoding="utf-8")

    def on_validation_batch_end(self, *_: Any) -> None:
        self.note()

    def note(self) -> None:
        """Take note that the rank is at work."""
        self._seen = time.monotonic()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended.set()

    def on_exception(self, *_: Any) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            if time.monotonic() - self._seen > self._hang_seconds:
                self._end()

    def _end(self) -> None:
        path = self._run_dir / "stacks" / f"rank-{self._rank:05d}.txt"
        print(
            f"stu-train: rank {self._rank} on {socket.gethostname()} has done nothing for "
            f"{self._hang_seconds / 60:g} minutes: its stacks are in {path}",
            file=sys.stderr,
            flush=True,
        )
        # If it is the disk that hangs, writing hangs too.
        threading.Timer(WRITE_SECONDS, os._exit, [HUNG]).start()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file)
        except OSError:
            faulthandler.dump_traceback(sys.stderr)
        finally:
            os._exit(HUNG)
