"""A replica of Ray Serve: an actor on a host of the cluster, with an engine in its own process.

Ray Serve starts replicas, replaces those that fail, and starts more while requests queue. Within a
replica the engine is supervised as in a server without Ray: one that ends or no longer responds is
replaced, and its requests continue.
"""

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.serve import get_replica_context

from serve.config import EngineConfig
from serve.devices import choose_devices
from serve.request import Output
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.replica import Replica
from serve.server.replicas.stream import Abandoned, EngineError, Stream, Unavailable
from serve.server.replicas.supervisor import ReplicasConfig
from serve.wire import (
    Message,
    Unpacker,
    error_to_wire,
    output_to_wire,
    pack,
    request_from_wire,
)
from stu.common.errors import UserError

UNBOUNDED = 2**31
"""Requests that may wait in a replica, which has no more than Ray Serve sends it."""


class _Engine(Replicas):
    """The engine of a replica. The server learns when it ends during a request, as it may be
    this request that ends engines, here and then in other replicas."""

    def _move(self, replica: Replica) -> None:
        for stream in replica.streams.values():
            stream.outputs.put_nowait(Output(stream.number))
        super()._move(replica)


class EngineReplica:
    """The class of the deployment.

    Args:
        settings: Fields of `ReplicasConfig` without the devices: each replica has one, the first
            GPU that Ray lets it see, or the CPU.

    Raises OSError if the engine cannot be started.
    """

    async def __init__(self, settings: Mapping[str, Any]) -> None:  # type: ignore[misc]
        values = {**settings, "model": Path(settings["model"])}
        values["engine"] = EngineConfig(**settings["engine"])
        devices = tuple(choose_devices("auto"))
        config = ReplicasConfig(**{**values, "devices": devices, "max_waiting": UNBOUNDED})
        self._replicas = _Engine(config)
        await self._replicas.start()
        await self._replicas.ready(lambda: True)

    async def decode(
        self, packed: bytes, prefix: bytes, cost: int, num_moves: int
    ) -> AsyncIterator[bytes]:
        """Decode a request, and yield messages, each with all outputs since the one before.

        A message has `outputs` and `num_moves`, with `waited`, the seconds before the prefill
        began, in the first one; or `refused`, `failed`, `abandoned` or `unavailable`, an error at
        the end. When an engine ends there is an output with nothing in it.

        Args:
            packed: The request, as `serve.wire` packs it.
            prefix: For `serve.ray.router`.
            cost: For `serve.ray.router`.
            num_moves: Engines and replicas that ended during the request since its last token.
        """
        (values,) = Unpacker().feed(packed)
        request, arrived = request_from_wire(values), time.monotonic()
        stream: Stream | None = None
        try:
            (stream,) = self._replicas.submit([request], request.client, num_moves=num_moves)
            while (message := await _next_message(stream))["outputs"]:
                message["num_moves"] = stream.num_moves
                if stream.scheduled is not None:
                    message["waited"] = stream.scheduled - arrived
                yield pack(message)
                if message["outputs"][-1].get("finish_reason") is not None:
                    return
        except UserError as error:
            yield pack({"refused": error_to_wire(error)})
        except EngineError as error:
            yield pack({"failed": str(error)})
        except Abandoned as error:
            yield pack({"abandoned": str(error)})
        except Unavailable as error:
            yield pack({"unavailable": str(error)})
        finally:
            if stream is not None:
                self._replicas.abort(stream)

    def report(self) -> Message:
        """Return the name of this replica, the state of its engine, and the counts of all that it
        has had."""
        return {
            "replica": get_replica_context().replica_id.unique_id,
            "stats": [asdict(stats) for stats in self._replicas.stats],
            "totals": asdict(self._replicas.totals()),
            "num_restarts": self._replicas.num_restarts,
        }

    def check_health(self) -> None:
        """Raise RuntimeError while no engine responds. After three times in a row, Ray Serve ends
        this replica and starts another, on any host."""
        if not self._replicas.is_healthy:
            raise RuntimeError("the engine does not respond")


async def _next_message(stream: Stream) -> Message:
    """Return a message with the next output of a stream and those that wait already.

    Raises the error that ends the stream.
    """
    outputs: list[Message] = []
    found: Output | Exception = await stream.outputs.get()
    while not isinstance(found, Exception):
        outputs.append(output_to_wire(found, 0))
        if stream.outputs.empty():
            return {"outputs": outputs}
        found = stream.outputs.get_nowait()
    if outputs:  # the error is for the next message
        stream.outputs.put_nowait(found)
        return {"outputs": outputs}
    raise found
