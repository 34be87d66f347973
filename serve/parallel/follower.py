"""A rank of a group other than the first: a process that does as the first one does.

    python -m serve.parallel.follower FD

FD is a socket to the first rank, with the messages of `serve.parallel.followers`. The process ends
when the socket is closed, so it never outlives the first rank.
"""

import ctypes
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch

from serve.config import EngineConfig
from serve.devices import is_out_of_memory, memory_checked
from serve.engine.engine import Engine
from serve.parallel.followers import digest_of
from serve.parallel.ranks import join
from serve.sampling_params import Constraint
from serve.wire import Message, Unpacker, pack, request_from_wire, unpack
from stu.common.cli import run_command
from stu.common.errors import UserError
from stu.common.machine import limit_threads
from stu.model_dir import load_model, load_tokenizer

RECEIVE_BYTES = 2**20
PR_SET_PDEATHSIG = 1
LAST_SECONDS = 5.0
"""Time in which the first rank ends, where an exchange with it has failed because of that."""


class Follower:
    """Takes the first rank's messages on a connection, and the same turns as it does."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._compiler = ThreadPoolExecutor(1)
        self._compiled: dict[Constraint, Future[None]] = {}
        self._digest = 0
        threading.Thread(target=self._receive, daemon=True).start()

    def run(self) -> None:
        """Load a part of the model, then decode until the process ends."""
        engine = self._load()
        while True:
            message = self._messages.get()
            if "turn" in message:
                self._take_turn(engine, message)
            elif "check" in message:
                engine.check_integrity()
            else:
                constraint = Constraint(**message["compile"])
                # Clients of those that are done may have gone away; the engine has what it needs.
                left = {own: done for own, done in self._compiled.items() if not done.done()}
                compiled = self._compiler.submit(engine.compile, constraint)
                self._compiled = {**left, constraint: compiled}

    def _load(self) -> Engine:
        settings = self._messages.get()
        limit_threads()
        if settings["dies_with_parent"]:
            _die_with_parent()
        self._connection.sendall(pack({"at": "start"}))
        config = EngineConfig(**settings["engine"])
        where = settings["rank"], settings["size"], settings["device"]
        ranks = join(settings["port"], *where, config.batch_invariant)
        dtype = getattr(torch, settings["dtype"])
        engine = Engine(
            load_model(settings["model"], settings["device"], dtype, config.weights, ranks),
            load_tokenizer(settings["model"]),
            config,
        )
        gc.collect()
        gc.freeze()  # or collections of all imported modules would hold up steps
        self._connection.sendall(pack({"at": "end"}))
        return engine

    def _take_turn(self, engine: Engine, turn: Message) -> None:
        if turn["digest"] != self._digest:
            raise RuntimeError("this rank's tokens differ from those of the first rank")
        for call in map(unpack, turn["turn"]):
            if "abort" in call:
                engine.abort(call["abort"])
                continue
            request = request_from_wire(call["add"])
            if request.sampling.constraint in self._compiled:
                self._compiled.pop(request.sampling.constraint).exception()  # once it is done
            with suppress(UserError):  # the first rank reports it
                engine.add_checked(request)
        self._digest = digest_of(engine.step())

    def _receive(self) -> None:
        unpacker = Unpacker()
        with suppress(ConnectionError):
            while data := self._connection.recv(RECEIVE_BYTES):
                for message in unpacker.feed(data):
                    self._messages.put(message)
        # The other thread may wait for a tensor that the first rank will not send any more.
        os._exit(0)


def main() -> int:
    """Run the process; return 2 after an error that the user can mend."""

    def follow() -> int:
        with socket.socket(fileno=int(sys.argv[1])) as connection, memory_checked():
            try:
                Follower(connection).run()
            except (RuntimeError, UserError) as error:
                if is_out_of_memory(error):
                    raise
                threading.Event().wait(LAST_SECONDS)  # the end of the first rank ends this one
                raise
        return 0

    logging.basicConfig(level=logging.WARNING, format="%(message)s")  # the first rank logs
    return run_command("stu rank", follow, "serve", EngineConfig)


def _die_with_parent() -> None:
    """Let Linux kill this process with the thread that started it, even while it is stopped and
    reads no socket."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
