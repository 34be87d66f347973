"""Answers of one body's requests: gathered into one, or sent piece by piece as they come."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from serve.completion import Completion, Gathering, piece_of
from serve.openai.schemas import StreamOptions
from serve.request import Output
from serve.server.arrivals import Arrivals, EngineError
from serve.server.exchange import Exchange, unquoted
from serve.server.metrics import Metrics
from serve.server.replicas.dispatch import Refused, Replicas, Stream
from serve.server.slices import Pauses, json_slices, pieces
from stu.common.text import Json, json_line

logger = logging.getLogger(__name__)

PADDED_BYTES = 128


class TimedOut(Exception):
    """The requests took too long."""


class Writer(Protocol):
    """How a choice is written."""

    def write(self, piece: Completion) -> Json:
        """With the next piece."""


@dataclass
class Answer:
    """The streams of one body, and what the answer has besides its choices.

    num_prompt_tokens: each prompt counts once.
    """

    replicas: Replicas
    metrics: Metrics
    streams: Sequence[Stream]
    writers: Sequence[Writer]
    frame: Json
    """Its id, model and time."""
    num_prompt_tokens: int
    timeout_seconds: float
    """From its arrival to the end."""
    arrived: float
    exchange: Exchange
    prompts: Sequence[str] | None = None
    """For the log, which has completions as well then."""
    _gathered: list[Gathering] = field(init=False)
    _error: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._gathered = [Gathering() for _ in self.streams]

    async def whole(self) -> list[bytes]:
        """Return the body of an answer in one, as JSON in pieces."""
        async for _ in self.outputs():
            pass
        return await asyncio.to_thread(lambda: list(pieces(self._whole())))

    def _whole(self) -> Iterator[str]:
        """Yield the JSON of an answer in one. A choice is forgotten once it is written: with log
        probabilities it takes many times the memory of its text."""
        usage = self.usage()
        yield f'{"".join(json_slices(self.frame))[:-1]},"choices":'
        separator = "["
        for index, writer in enumerate(self.writers):
            completion = self._gathered[index].completion()
            self._gathered[index] = Gathering()
            yield separator
            yield from json_slices(writer.write(completion))
            separator = ","
        yield f'],"usage":{"".join(json_slices(usage))}}}'

    async def events(
        self,
        first: tuple[int, Output],
        rest: AsyncIterator[tuple[int, Output]],
        options: StreamOptions,
    ) -> AsyncIterator[str]:
        """Server-sent events: each piece that has anything, the usage if asked for, and the end.

        Usage that every piece is to have counts the tokens of all choices up to there."""
        has_usage = bool(options.include_usage)
        usage: Json = {"usage": None} if has_usage else {}
        async for index, output in _chained(first, rest):
            piece = piece_of(output)
            is_last = piece.finish_reason is not None
            if piece.text or piece.logprobs or piece.prompt_logprobs or is_last:
                choice = self.writers[index].write(piece)
                if has_usage and options.continuous_usage_stats:
                    usage = {"usage": self.usage()}
                values = {**self.frame, "choices": [choice], **usage}
                yield event(_padded(values) if options.include_obfuscation else values)
        if has_usage:
            yield event({**self.frame, "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"

    def usage(self) -> Json:
        """OpenAI's count of tokens."""
        num_new_tokens = sum(len(its.token_ids) for its in self._gathered)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_new_tokens,
            "total_tokens": self.num_prompt_tokens + num_new_tokens,
        }

    async def outputs(self, keeps_logprobs: bool = True) -> AsyncIterator[tuple[int, Output]]:
        """All streams' outputs as they come, each with the number of its choice. A reader that
        stops early ends them all; so does an error of one. A reader that takes nothing is cut off
        once it is too far behind.

        keeps_logprobs: for the answer in one, which is written at the end.

        Raises Refused, Unavailable, EngineError, or TimedOut.
        """
        arrived = Arrivals(self._cut_off)
        late = TimedOut(f"not done within {self.timeout_seconds:g} seconds")
        left = self.arrived + self.timeout_seconds - time.monotonic()

        def end() -> None:
            # Now, and not when its reader takes the next piece, which it may never do.
            for stream in self.streams:
                self.replicas.abort(stream)
            arrived.put(0, late)

        timer = asyncio.get_running_loop().call_later(left, end)
        tasks = [
            asyncio.create_task(self._forward(index, stream, arrived))
            for index, stream in enumerate(self.streams)
        ]
        pauses = Pauses()
        try:
            num_left = len(tasks)
            while num_left:
                await pauses.pause_if_due()
                index, output = await arrived.take()
                if isinstance(output, Exception):
                    self._error = str(output)
                    raise output
                if output is None:
                    num_left -= 1
                else:
                    kept = output
                    if not keeps_logprobs:
                        kept = replace(output, logprobs=(), prompt_logprobs=())
                    self._gathered[index].add(kept)
                    yield index, output
        finally:
            timer.cancel()
            for task in tasks:
                task.cancel()
            for stream in self.streams:  # a task that had not begun aborts nothing
                self.replicas.abort(stream)
            self._log()

    def _cut_off(self, num_bytes: int) -> bool:
        if not self.exchange.cut_off_if_stalled(
            f"its client is {num_bytes} bytes of tokens behind"
        ):
            return False
        for stream in self.streams:
            self.replicas.abort(stream)
        return True

    async def _forward(self, index: int, stream: Stream, arrived: "Arrivals") -> None:
        metrics, last = self.metrics, self.arrived
        reason = "abort"
        num_tokens = 0
        try:
            async for output in self.replicas.outputs(stream):
                now = time.monotonic()
                if num_tokens == 0:
                    metrics.queue_time.observe((stream.scheduled or now) - self.arrived)
                    metrics.prompt_tokens.inc(len(stream.request.prompt_token_ids))
                    if output.new_token_ids:
                        metrics.time_to_first_token.observe(now - self.arrived)
                elif output.new_token_ids:
                    metrics.inter_token.observe(now - last)
                num_tokens, last = num_tokens + len(output.new_token_ids), now
                metrics.generation_tokens.inc(len(output.new_token_ids))
                if output.finish_reason == "error":
                    raise (Refused if output.is_refused else EngineError)(output.error)
                reason = output.finish_reason or reason
                arrived.put(index, output)
            arrived.put(index, None)
        except Exception as error:
            reason = "error"
            arrived.put(index, error)
        finally:
            metrics.finished(reason)
            metrics.latency.observe(time.monotonic() - self.arrived)
            metrics.request_prompt_tokens.observe(len(stream.request.prompt_token_ids))
            metrics.request_generation_tokens.observe(num_tokens)

    def _log(self) -> None:
        fields = {
            "request_id": self.exchange.request_id,
            "client": self.exchange.client,
            "seconds": round(time.monotonic() - self.arrived, 4),
            **self.usage(),
            "finish_reasons": [its.finish_reason or "abort" for its in self._gathered],
        }
        if self._error:
            fields["error"] = self._error if self.prompts is not None else unquoted(self._error)
        if self.prompts is not None:
            completions = ["".join(its.texts) for its in self._gathered]
            fields |= {"prompts": self.prompts, "completions": completions}
        logger.info("request ended", extra={"fields": fields})


def event(values: Json) -> str:
    """One server-sent event."""
    return f"data: {json_line(values)}\n\n"


def _padded(values: Json) -> Json:
    """`values` with text of chance that makes their length a multiple of `PADDED_BYTES`."""
    filled = {**values, "obfuscation": ""}
    missing = -len(event(filled).encode()) % PADDED_BYTES
    return {**filled, "obfuscation": secrets.token_hex(missing)[:missing]}


async def _chained(
    first: tuple[int, Output], rest: AsyncIterator[tuple[int, Output]]
) -> AsyncIterator[tuple[int, Output]]:
    yield first
    async for each in rest:
        yield each
