"""Ranks that `stu-train` starts itself on one machine, without srun or torchrun."""

import atexit
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

LOOK_SECONDS = 0.5
PATIENCE_SECONDS = 60.0
"""Time the first rank has to end by itself after another one failed or was stopped."""
STOP_SECONDS = 10.0
"""Time the other ranks have to end when the first one ends early."""


PORTS = range(10_000, 15_000)
"""Ports below Lightning's for Slurm jobs, and below those that systems hand out."""


class Launcher(_SubprocessScriptLauncher):
    """Lightning's launcher, except that all ranks end, and with the exit codes they chose.

    Lightning kills the first rank, busy or not, a few seconds after another one ended with a code
    other than 0, and does not end the others when the first one ends early.
    """

    def launch(
        self,
        function: Callable[..., Any],
        *args: Any,
        trainer: L.Trainer | None = None,
        **kwargs: Any,
    ) -> Any:
        if self.cluster_environment.creates_processes_externally:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        environment = self.cluster_environment
        if isinstance(environment, LightningEnvironment) and "MASTER_PORT" not in os.environ:
            environment._main_port = unused_port()
        self._call_children_scripts()
        self._is_ending = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="launcher").start()
        try:
            _set_num_threads_if_needed(num_processes=self.num_processes)
            return function(*args, **kwargs)
        except SystemExit:  # a signal before training
            self._is_ending.set()
            self.kill(signal.SIGTERM)
            self._end_others()
            raise
        except BaseException:
            self._is_ending.set()
            # If all ranks raise it, they complete the last checkpoint together after this.
            atexit.register(self._end_others)
            raise

    def _end_others(self) -> None:
        """Wait until the other ranks end, and end those that still wait for this one."""
        deadline = time.monotonic() + STOP_SECONDS
        while any(process.poll() is None for process in self.procs):
            if time.monotonic() > deadline:
                self.kill(signal.SIGKILL)
                return
            time.sleep(0.1)

    def _watch(self) -> None:
        """End this process if another rank failed and this one does not notice."""
        had_group = False
        while True:
            # Until there is a group, this rank waits in it for the others and acts on no signal.
            had_group |= torch.distributed.is_initialized()
            codes = [process.poll() for process in self.procs]
            if failed := next((code for code in codes if code), 0):
                break
            if all(code == 0 for code in codes):
                return
            time.sleep(LOOK_SECONDS)
        if self._is_ending.wait(PATIENCE_SECONDS if had_group else LOOK_SECONDS):
            time.sleep(PATIENCE_SECONDS)  # this rank says why it ends, unless it hangs
        code = failed if failed > 0 else 128 - failed
        print(f"stu-train: another rank ended with code {code}", file=sys.stderr, flush=True)
        self.kill(signal.SIGKILL)
        os._exit(code)


def unused_port() -> int:
    """Return a port that nobody listens at.

    The first rank listens there a second later. Until then an outgoing connection of any process
    could take a port that the system hands out, and the run would fail.
    """
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
