"""Messages between the server and its replicas: msgpack maps, one after the other, on a socket.

To a replica: its settings, then `{"add": number, "request": {..}}` and `{"abort": number}`.

From a replica: `{"ready": stats}` once. Then `{"refused": number, "error": {..}}` for a request at
fault, `{"failed": number, "trace": ..}` for a fault of the replica, and a report after each step,
and regularly when idle: `{"time": time, "scheduled": [[number, time], ..], "outputs": [..],
"stats": {..}}`, with `step_seconds` if there were outputs, and `step_tokens` if the step prefilled
or generated any, and now and then `free_bytes` of a GPU. Times are of the monotonic clock, which
all processes share.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any, overload

import msgpack

from serve.request import Output, Request, TokenLogprobs
from serve.sampling_params import Constraint, SamplingParams
from stu.common.errors import UserError

Message = dict[str, Any]
MOST_BYTES = 2**28
"""Limit of a message; those with the log probabilities of a prompt are the largest."""
HEADER_BYTES = 5
"""Largest size of what says how long a list is."""


def pack(message: Message) -> bytes:
    """Return a message as bytes."""
    packed: bytes = msgpack.packb(message)
    return packed


def unpack(packed: bytes) -> Message:
    """Return the message that `pack` wrote."""
    message: Message = msgpack.unpackb(packed, strict_map_key=False)
    return message


class Unpacker:
    """Reads messages from bytes that may be cut anywhere."""

    def __init__(self) -> None:
        self._unpacker = _unpacker(b"")

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that are whole with `data`."""
        self._unpacker.feed(data)
        yield from self._unpacker


class PackedLogprobs(Sequence[TokenLogprobs]):
    """Log probabilities as a replica sent them, unpacked one by one where they are used: as objects
    they take nine times the memory, and those of a long prompt seconds, in which other threads
    run."""

    __slots__ = ("_packed",)

    def __init__(self, packed: bytes) -> None:
        self._packed = packed

    @property
    def num_bytes(self) -> int:
        """Memory in bytes."""
        return len(self._packed)

    def __len__(self) -> int:
        length: int = _unpacker(self._packed[:HEADER_BYTES]).read_array_header()
        return length

    @overload
    def __getitem__(self, index: int) -> TokenLogprobs: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenLogprobs]: ...

    def __getitem__(self, index: int | slice) -> TokenLogprobs | list[TokenLogprobs]:
        return list(self)[index]

    def __iter__(self) -> Iterator[TokenLogprobs]:
        unpacker = _unpacker(self._packed)
        for _ in range(unpacker.read_array_header()):
            yield TokenLogprobs(*unpacker.unpack())


def _unpacker(packed: bytes) -> msgpack.Unpacker:
    unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=MOST_BYTES)
    unpacker.feed(packed)
    return unpacker


def request_to_wire(request: Request) -> Message:
    """Return a request as a message. (`asdict` would copy each token of its prompt.)"""
    values = {field.name: getattr(request, field.name) for field in fields(request)}
    values["sampling"] = asdict(request.sampling)
    return values


def request_from_wire(values: Message) -> Request:
    """Return the request in a message of `request_to_wire`."""
    sampling = dict(values["sampling"])
    if sampling["constraint"] is not None:
        sampling["constraint"] = Constraint(**sampling["constraint"])
    return Request(**{**values, "sampling": SamplingParams(**sampling)})


def output_to_wire(output: Output, number: int) -> Message:
    """Return an output as a message, with the server's number of its request."""
    ids = list(output.new_token_ids)
    values = {"request_id": number, "new_token_ids": ids, "text": output.text}
    for name in ("logprobs", "prompt_logprobs"):
        if logprobs := getattr(output, name):
            values[name] = msgpack.packb(
                [[token.token, token.logprob, token.top, token.rank] for token in logprobs]
            )
    if output.cached_tokens:
        values["cached_tokens"] = output.cached_tokens
    if output.finish_reason is not None:
        names = ("finish_reason", "ends_with_stop_token", "error", "is_refused")
        values |= {name: getattr(output, name) for name in names}
    if output.embedding:
        values["embedding"] = array("d", output.embedding).tobytes()
    return values


def output_from_wire(values: Message) -> Output:
    """Return the output in a message of `output_to_wire`."""
    for name in ("logprobs", "prompt_logprobs"):
        if name in values:
            values[name] = PackedLogprobs(values[name])
    if "embedding" in values:
        values["embedding"] = array("d", values["embedding"])
    return Output(**values)


def error_to_wire(error: UserError) -> Message:
    """Return an error as a message."""
    return {"field": error.field, "message": str(error), "code": error.code}


def error_from_wire(values: Message) -> UserError:
    """Return the error in a message of `error_to_wire`."""
    return UserError(values["field"], message=values["message"], code=values["code"])
