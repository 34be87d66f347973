"""A replica: a process with an engine.

    python -m serve.server.replicas.process FD

FD is a socket to the server, with the messages of `serve.wire`. The process ends
when the socket is closed, so it never outlives the server.
"""

import gc
import logging
import select
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from serve.config import EngineConfig
from serve.devices import memory_checked
from serve.engine.engine import Engine
from serve.parallel.loading import make_engine
from serve.request import Request
from serve.wire import (
    Message,
    Unpacker,
    error_to_wire,
    output_to_wire,
    pack,
    request_from_wire,
)
from stu.common.cli import run_command
from stu.common.errors import UserError
from stu.model_dir import load_tokenizer

HEARTBEAT_SECONDS = 0.25
"""Time between reports while there is nothing to do."""
COMPILING_SECONDS = 0.01
"""Time between checks whether a constraint is compiled, while there is nothing else to do."""
FREE_MEMORY_SECONDS = 1.0
"""Time between reports of a GPU's free memory."""
RECEIVE_BYTES = 2**20


class Replica:
    """Decodes the requests that come on a connection until that is closed."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._unpacker = connection, Unpacker()
        # `select` takes no descriptors above 1023, which a server with many connections passes on.
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._numbers: dict[int, int] = {}
        """The server's numbers of requests, by the engine's ids."""
        self._engine_ids: dict[int, int] = {}
        """The engine's ids of requests, by the server's numbers."""
        self._device = torch.device("cpu")
        self._compiler = ThreadPoolExecutor(1)
        self._compiling: dict[int, tuple[Request, Future[None]]] = {}
        """Requests whose constraint a thread compiles, as it would hold up all others here."""

    def run(self) -> None:
        """Load the model that the first message names, then decode."""
        engine = self._load()
        was_idle, num_tokens, reported = False, 0, 0.0
        while True:
            idle_seconds = COMPILING_SECONDS if self._compiling else HEARTBEAT_SECONDS
            for message in self._receive(0.0 if engine.has_work else idle_seconds):
                self._handle(engine, message)
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
            scheduled = [[self._numbers[own], when] for own, when in engine.scheduled.items()]
            engine.scheduled.clear()  # or an idle turn would report requests that have ended
            written = [
                output_to_wire(output, self._numbers[output.request_id]) for output in outputs
            ]
            for output in outputs:
                if output.finish_reason is not None:
                    del self._engine_ids[self._numbers.pop(output.request_id)]
            stats, ended = engine.stats(), time.monotonic()
            report: Message = {
                "time": ended,
                "scheduled": scheduled,
                "outputs": written,
                "stats": asdict(stats),
            }
            if outputs:
                report["step_seconds"] = ended - began
            num_before, num_tokens = num_tokens, stats.prompt_tokens + stats.new_tokens
            if num_tokens > num_before:
                report["step_tokens"] = num_tokens - num_before
            if self._device.type == "cuda" and ended - reported > FREE_MEMORY_SECONDS:
                report["free_bytes"], _ = torch.cuda.mem_get_info(self._device)
                reported = ended
            self._send(report)

    def _load(self) -> Engine:
        settings = self._first_message()
        dtype = getattr(torch, settings["dtype"])
        self._device = torch.device(settings["device"].split(",")[0])  # of the first rank
        config = EngineConfig(**settings["engine"])
        tokenizer = load_tokenizer(settings["model"])
        adapters = {name: Path(path) for name, path in settings.get("adapters", {}).items()}
        engine = make_engine(
            settings["model"], settings["device"], dtype, tokenizer, config, adapters=adapters
        )
        gc.collect()
        gc.freeze()  # or collections of all imported modules would hold up steps
        self._send({"ready": asdict(engine.stats())})
        return engine

    def _first_message(self) -> Message:
        while True:
            for message in self._receive(None):
                return message

    def _handle(self, engine: Engine, message: Message) -> None:
        if "abort" in message:
            self._compiling.pop(message["abort"], None)
            if (engine_id := self._engine_ids.get(message["abort"])) is not None:
                engine.abort(engine_id)
            return
        number = message["add"]
        try:
            request = request_from_wire(message["request"])
        except Exception:
            self._fail(number)
            return
        if request.sampling.constraint is None:
            self._add(engine, number, request)
        else:
            compiled = self._compiler.submit(engine.compile, request.sampling.constraint)
            self._compiling[number] = request, compiled

    def _add(self, engine: Engine, number: int, request: Request) -> None:
        try:
            engine_id = engine.add_checked(request)  # the server has checked it
        except UserError as error:
            self._send({"refused": number, "error": error_to_wire(error)})
        except Exception:
            self._fail(number)
        else:
            self._numbers[engine_id], self._engine_ids[number] = number, engine_id

    def _fail(self, number: int) -> None:
        """Report the exception that is being handled; the other requests continue."""
        self._send({"failed": number, "trace": traceback.format_exc()})

    def _send(self, message: Message) -> None:
        self._connection.sendall(pack(message))

    def _receive(self, timeout: float | None) -> Iterator[Message]:
        """Yield the messages that come within a time in seconds. Ends the process with the
        server."""
        milliseconds = None if timeout is None else 1000 * timeout
        while self._poll.poll(milliseconds):
            data = self._connection.recv(RECEIVE_BYTES)
            if not data:
                sys.exit(0)
            yield from self._unpacker.feed(data)
            milliseconds = 0.0


def main() -> int:
    """Run the process; return 0 if the server ended, 2 after an error that the user can mend."""

    def serve() -> int:
        connection = socket.socket(fileno=int(sys.argv[1]))
        with connection, memory_checked(), suppress(ConnectionError):  # the server ended
            Replica(connection).run()
        return 0

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the server logs what starts
    return run_command("stu-serve replica", serve, "serve", EngineConfig)


if __name__ == "__main__":
    sys.exit(main())
