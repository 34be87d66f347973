"""What a server and its engines tell each other: msgpack, one map after the other, on a socket.

To an engine: its settings, then `{"add": id, "request": {..}}` and `{"abort": id}`. From it:
`{"ready": {..}}`, `{"refused": id, "error": ..}`, and after each step, and when idle now and then,
`{"scheduled": [[id, time], ..], "outputs": [..], "stats": {..}}`, and `step_seconds` after a step.
Times are those of the monotonic clock, which processes of one machine share.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any, overload

import msgpack

from serve.request import Output, Request, TokenLogprobs
from serve.sampling_params import Constraint, SamplingParams

Message = dict[str, Any]
MOST_BYTES = 2**28
"""Of a message: a prompt's log probabilities are the largest."""


def pack(message: Message) -> bytes:
    """A message as bytes."""
    packed: bytes = msgpack.packb(message)
    return packed


class Unpacker:
    """Messages from bytes, however they are cut."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=MOST_BYTES)

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are whole now."""
        self._unpacker.feed(data)
        yield from self._unpacker


class PackedLogprobs(Sequence[TokenLogprobs]):
    """Log probabilities as an engine sent them, unpacked where they are used: as objects they take
    nine times the memory."""

    __slots__ = ("_packed",)

    def __init__(self, packed: bytes) -> None:
        self._packed = packed

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        return len(self._packed)

    def __len__(self) -> int:
        return len(self._unpacked())

    @overload
    def __getitem__(self, index: int) -> TokenLogprobs: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenLogprobs]: ...

    def __getitem__(self, index: int | slice) -> TokenLogprobs | list[TokenLogprobs]:
        return self._unpacked()[index]

    def __iter__(self) -> Iterator[TokenLogprobs]:
        return iter(self._unpacked())

    def _unpacked(self) -> list[TokenLogprobs]:
        return [
            TokenLogprobs(*each) for each in msgpack.unpackb(self._packed, strict_map_key=False)
        ]


def request_to_wire(request: Request) -> Message:
    """All of its fields. (`asdict` would copy each token of a prompt.)"""
    values = {field.name: getattr(request, field.name) for field in fields(request)}
    values["sampling"] = asdict(request.sampling)
    return values


def request_from_wire(values: Message) -> Request:
    """From what `request_to_wire` gave."""
    sampling = dict(values["sampling"])
    if sampling["constraint"] is not None:
        sampling["constraint"] = Constraint(**sampling["constraint"])
    return Request(**{**values, "sampling": SamplingParams(**sampling)})


def output_to_wire(output: Output, request_id: int) -> Message:
    """All of its fields, with the server's number of the request."""
    ids = list(output.new_token_ids)
    values = {"request_id": request_id, "new_token_ids": ids, "text": output.text}
    for name in ("logprobs", "prompt_logprobs"):
        if its := getattr(output, name):
            values[name] = msgpack.packb([[each.token, each.logprob, each.top] for each in its])
    if output.finish_reason is not None:
        names = ("finish_reason", "ends_with_stop_token", "error", "is_refused")
        values |= {name: getattr(output, name) for name in names}
    return values


def output_from_wire(values: Message) -> Output:
    """From what `output_to_wire` gave."""
    for name in ("logprobs", "prompt_logprobs"):
        if name in values:
            values[name] = PackedLogprobs(values[name])
    return Output(**values)
