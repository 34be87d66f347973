"""One engine of a server, as a process of its own.

    python -m serve.server.replicas.process FD

where FD is a socket to the server, on which it is told what to do (see
`serve.server.replicas.wire`). It ends when the socket does, so that it does not outlive the server,
however that one ends.
"""

import gc
import select
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

import torch

from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.request import Request
from serve.server.replicas.wire import Message, Unpacker, output_to_wire, pack, request_from_wire
from stu.common.cli import run_command
from stu.model_dir import load_model, load_tokenizer

HEARTBEAT_SECONDS = 0.25
"""Between signs of life while there is nothing to do."""
COMPILING_SECONDS = 0.01
"""Between looks at whether a constraint is compiled, while there is nothing else to do."""
RECEIVE_BYTES = 2**20


class Replica:
    """Does what it is told on `connection`, until that is closed."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._unpacker = connection, Unpacker()
        # `select` takes no descriptor from 1024 on, which a server with many connections gives.
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._ids: dict[int, int] = {}
        """The server's number of a request, by the engine's,"""
        self._engine_ids: dict[int, int] = {}
        """and the other way round."""
        self._compiler = ThreadPoolExecutor(1)
        self._compiling: dict[int, tuple[Request, Future[None]]] = {}
        """Requests whose constraint is being compiled, which would hold up all others here."""

    def run(self) -> None:
        """Load what the first message names, say so, and decode."""
        engine = self._load()
        was_idle = False
        while True:
            idle_seconds = COMPILING_SECONDS if self._compiling else HEARTBEAT_SECONDS
            for message in self._received(0.0 if engine.has_work else idle_seconds):
                self._obey(engine, message)
            for number, (request, compiled) in list(self._compiling.items()):
                if compiled.done():
                    del self._compiling[number]
                    self._add(engine, number, request)
            began = time.monotonic()
            outputs = engine.step() if engine.has_work else []
            is_idle = not engine.has_work
            if is_idle and not was_idle:
                engine.check_integrity()
            was_idle = is_idle
            scheduled = [[self._ids[its], when] for its, when in engine.scheduled.items()]
            engine.scheduled.clear()  # or an idle turn would report requests that have ended
            written = [output_to_wire(its, self._ids[its.request_id]) for its in outputs]
            for its in outputs:
                if its.finish_reason is not None:
                    del self._engine_ids[self._ids.pop(its.request_id)]
            report: Message = {
                "scheduled": scheduled,
                "outputs": written,
                "stats": asdict(engine.stats()),
            }
            if outputs:
                report["step_seconds"] = time.monotonic() - began
            self._connection.sendall(pack(report))

    def _load(self) -> Engine:
        settings = self._first_message()
        dtype = getattr(torch, settings["dtype"])
        config = EngineConfig(**settings["engine"])
        tokenizer = load_tokenizer(settings["model"])
        # The engine keeps what it needs of the model, which nobody else holds.
        engine = Engine(load_model(settings["model"], settings["device"], dtype), tokenizer, config)
        gc.collect()
        gc.freeze()  # or a step now and then would wait for a collection of all that was imported
        self._connection.sendall(pack({"ready": asdict(engine.stats())}))
        return engine

    def _first_message(self) -> Message:
        while True:
            for message in self._received(None):
                return message

    def _obey(self, engine: Engine, message: Message) -> None:
        if "abort" in message:
            self._compiling.pop(message["abort"], None)
            if (engine_id := self._engine_ids.get(message["abort"])) is not None:
                engine.abort(engine_id)
            return
        number = message["add"]
        try:
            request = request_from_wire(message["request"])
        except ValueError as error:
            self._connection.sendall(pack({"refused": number, "error": str(error)}))
            return
        if request.sampling.constraint is None:
            self._add(engine, number, request)
        else:
            compiled = self._compiler.submit(engine.compile, request.sampling.constraint)
            self._compiling[number] = request, compiled

    def _add(self, engine: Engine, number: int, request: Request) -> None:
        try:
            engine_id = engine.add(request)
        except ValueError as error:
            self._connection.sendall(pack({"refused": number, "error": str(error)}))
            return
        self._ids[engine_id], self._engine_ids[number] = number, engine_id

    def _received(self, timeout: float | None) -> Iterator[Message]:
        """Messages, if there are any within so many seconds. Ends the process with the server."""
        milliseconds = None if timeout is None else 1000 * timeout
        while self._poll.poll(milliseconds):
            data = self._connection.recv(RECEIVE_BYTES)
            if not data:
                sys.exit(0)
            yield from self._unpacker.feed(data)
            milliseconds = 0.0


def main() -> int:
    """The process. 0: the server ended; 2: an error that a user can mend, which stderr says."""

    def serve() -> int:
        with socket.socket(fileno=int(sys.argv[1])) as connection:
            try:
                Replica(connection).run()
            except ConnectionError:
                pass  # the server ended
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    "out of memory: lower cache_gib, max_running or prompt_tokens_per_step"
                ) from error
        return 0

    return run_command("stu-serve replica", serve, "serve")


if __name__ == "__main__":
    sys.exit(main())
