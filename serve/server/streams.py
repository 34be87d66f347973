"""Answers to bodies: a whole one at the end, or pieces as they come."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from serve.completion import Completion, CompletionBuilder, piece_of
from serve.openai.choices import ChoiceWriter
from serve.openai.endpoint import Endpoint, usage
from serve.openai.schemas import StreamOptions
from serve.request import Output
from serve.server.arrivals import Arrivals
from serve.server.exchange import Exchange
from serve.server.operating.metrics import ModelMetrics
from serve.server.replicas.dispatcher import Dispatcher
from serve.server.replicas.slices import Pauses, json_slices, pieces, sliced_line
from serve.server.replicas.stream import EngineError, Stream
from stu.common.errors import UserError
from stu.common.text import Json, json_line

logger = logging.getLogger(__name__)

PADDED_BYTES = 128
Writing = Callable[[Json], str]


class TimedOut(Exception):
    """The requests of a body took too long."""


@dataclass
class Answer:
    """The answer to one body, written while its requests are decoded."""

    replicas: Dispatcher
    metrics: ModelMetrics
    endpoint: Endpoint[Any]
    body: Any
    """Body that the client sent, of the endpoint's type."""
    streams: Sequence[Stream]
    """A stream of outputs for each request of the body."""
    writers: Sequence[ChoiceWriter]
    """A writer for each result."""
    frame: Json
    """The answer without results and usage."""
    num_prompt_tokens: int
    """Number of prompt tokens; a prompt of several choices counts once."""
    timeout_seconds: float
    """Limit of the time from the arrival of the body to the end of its answer."""
    arrived: float
    """Time of the arrival, by the monotonic clock."""
    exchange: Exchange
    on_end: Callable[["Answer"], None] | None = None
    """Function to call once all requests have ended."""
    prompts: Sequence[str] | None = None
    """Prompts for the log, which then has the completions too."""
    _builders: list[CompletionBuilder] = field(init=False)
    error: Exception | None = field(default=None, init=False)
    """Why a request failed."""

    def __post_init__(self) -> None:
        self._builders = [CompletionBuilder() for _ in self.streams]
        for stream in self.streams:
            if not stream.is_background:
                stream.on_scheduled = self._observe_queue_time

    @property
    def choices_per_prompt(self) -> int:
        """Number of requests of each prompt, which follow one another."""
        return self.endpoint.choices_per_prompt(self.body)

    async def whole(self) -> list[bytes]:
        """Return a whole answer, as JSON in pieces."""
        async for _ in self.outputs():
            pass
        return await asyncio.to_thread(lambda: list(pieces(self._whole())))

    def _whole(self) -> Iterator[str]:
        """Yield the JSON of a whole answer."""
        endpoint, usage = self.endpoint, self.usage()
        yield f'{"".join(json_slices(self.frame))[:-1]},"{endpoint.list_name}":'
        separator = "["
        for result in endpoint.results(self.body, self.writers, self._completions()):
            yield separator
            yield from json_slices(result)
            separator = ","
        last = {"usage": usage, **endpoint.last_fields(self.body, self.writers)}
        separator = "],"
        for name, value in last.items():
            yield f'{separator}"{name}":'
            yield from json_slices(value)
            separator = ","
        yield "}"

    def _completions(self) -> Iterator[Completion]:
        """Yield the completions of all requests. Each is freed once it is used: with log
        probabilities it takes many times the memory of its text."""
        for index in range(len(self._builders)):
            completion = self._builders[index].completion()
            self._builders[index] = CompletionBuilder()
            yield completion

    async def events(
        self,
        first: tuple[int, Output],
        rest: AsyncIterator[tuple[int, Output]],
        options: StreamOptions,
    ) -> AsyncIterator[str]:
        """Yield server-sent events: each piece with anything in it, usage if asked for, the end.

        Args:
            first: First of the `outputs`.
            rest: The other ones.
            options: Those of the body.
        """
        has_usage = bool(options.include_usage)
        with_usage: Json = {"usage": None} if has_usage else {}
        async for index, output in chained(first, rest):
            piece = piece_of(output)
            is_last = piece.finish_reason is not None
            if piece.text or piece.logprobs or piece.prompt_logprobs or is_last:
                if has_usage and options.continuous_usage_stats:
                    with_usage = {"usage": self.usage()}
                written = partial(self._event, index, piece, options, with_usage)
                if piece.prompt_logprobs:  # those of a long prompt take seconds
                    yield await asyncio.to_thread(written, sliced_line)
                else:
                    yield written(json_line)
        if has_usage:
            yield event({**self.frame, "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"

    def _event(
        self, index: int, piece: Completion, options: StreamOptions, usage: Json, write: Writing
    ) -> str:
        values = {**self.frame, "choices": [self.writers[index].write(piece)], **usage}
        return event(padded(values, write) if options.include_obfuscation else values, write)

    def usage(self) -> Json:
        """Return OpenAI's numbers of tokens, of all choices so far."""
        num_new_tokens = sum(len(choice.token_ids) for choice in self._builders)
        first_choices = self._builders[:: self.choices_per_prompt]
        cached = sum(choice.cached_tokens for choice in first_choices)
        details = {"prompt_tokens_details": {"cached_tokens": cached}}
        return {**usage(self.num_prompt_tokens, num_new_tokens), **details}

    async def outputs(self, keeps_logprobs: bool = True) -> AsyncIterator[tuple[int, Output]]:
        """Yield the outputs of all streams as they come, each with the index of its choice.

        All requests end if a reader stops early, or if one of them fails. A client that takes
        nothing is cut off once it is too far behind.

        Args:
            keeps_logprobs: Whether to keep log probabilities for a whole answer.

        Raises:
            UserError: An engine refuses a request.
            Unavailable, EngineError, TimedOut: A request failed for another reason.
        """
        arrivals = Arrivals(self._cut_off)
        late = TimedOut(f"the request was not done within {self.timeout_seconds:g} seconds")
        left = self.arrived + self.timeout_seconds - time.monotonic()

        def end() -> None:
            # At once, and not when a reader takes the next piece, which it may never do.
            for stream in self.streams:
                self.replicas.abort(stream)
            arrivals.put(0, late)

        timer = asyncio.get_running_loop().call_later(left, end)
        tasks = [
            asyncio.create_task(self._forward(index, stream, arrivals))
            for index, stream in enumerate(self.streams)
        ]
        pauses = Pauses()
        try:
            num_left = len(tasks)
            while num_left:
                await pauses.pause_if_due()
                index, output = await arrivals.take()
                if isinstance(output, Exception):
                    self.error = output
                    raise output
                if output is None:
                    num_left -= 1
                    continue
                kept = output
                if not keeps_logprobs:
                    kept = replace(output, logprobs=(), prompt_logprobs=())
                self._builders[index].add(kept)
                yield index, output
        finally:
            timer.cancel()
            for task in tasks:
                task.cancel()
            for stream in self.streams:  # a task that never began aborts nothing
                self.replicas.abort(stream)
            if self.on_end is not None:
                self.on_end(self)
            self._log()

    def _cut_off(self, num_bytes: int) -> bool:
        reason = f"its client is {num_bytes} bytes of tokens behind"
        if not self.exchange.cut_off_if_stalled(reason):
            return False
        for stream in self.streams:
            self.replicas.abort(stream)
        return True

    async def _forward(self, index: int, stream: Stream, arrivals: Arrivals) -> None:
        """Pass the outputs of a choice on, and count them."""
        metrics, last = self.metrics, self.arrived
        is_timed = not stream.is_background
        reason = "abort"
        num_tokens = 0
        try:
            async for output in self.replicas.outputs(stream):
                now = time.monotonic()
                if num_tokens == 0:
                    metrics.prompt_tokens.inc(len(stream.request.prompt_token_ids))
                    if output.new_token_ids and is_timed:
                        metrics.time_to_first_token.observe(now - self.arrived)
                elif output.new_token_ids and is_timed:
                    metrics.inter_token.observe(now - last)
                num_tokens, last = num_tokens + len(output.new_token_ids), now
                metrics.generation_tokens.inc(len(output.new_token_ids))
                if output.finish_reason == "error":
                    raise self._error_of(output, stream)
                reason = output.finish_reason or reason
                arrivals.put(index, output)
            arrivals.put(index, None)
        except Exception as error:
            reason = "error"
            arrivals.put(index, error)
        finally:
            metrics.finished(reason, stream)
            if is_timed:
                metrics.latency.observe(time.monotonic() - self.arrived)

    def _observe_queue_time(self, scheduled: float) -> None:
        self.metrics.queue_time.observe(scheduled - self.arrived)

    def finish_reasons(self) -> list[str]:
        """Return why each choice has ended; abort if it has not."""
        return [choice.finish_reason or "abort" for choice in self._builders]

    def _error_of(self, output: Output, stream: Stream) -> Exception:
        """Return the error that ended a request in mid-text."""
        constraint = stream.request.sampling.constraint
        if output.is_refused and constraint is not None:  # it turned out to be too costly
            field = self.endpoint.constraint_field(self.body, constraint.kind)
            return UserError(field, output.error, message=output.error)
        return EngineError(output.error)

    def _log(self) -> None:
        logs_texts = self.prompts is not None
        fields = {
            "request_id": self.exchange.request_id,
            "client": self.exchange.client,
            "model": self.frame["model"],
            "seconds": round(time.monotonic() - self.arrived, 4),
            **self.usage(),
            "finish_reasons": self.finish_reasons(),
        }
        if isinstance(self.error, UserError) and not logs_texts:
            fields["error"] = self.error.without_value()
        elif self.error is not None:
            fields["error"] = str(self.error)
        if logs_texts:
            completions = ["".join(choice.texts) for choice in self._builders]
            fields |= {"prompts": self.prompts, "completions": completions}
        logger.info("request ended", extra={"fields": fields})


def event(values: Json, write: Writing = json_line) -> str:
    """Return a server-sent event, given a function that writes JSON on one line."""
    return f"data: {write(values)}\n\n"


def padded(values: Json, write: Writing = json_line) -> Json:
    """Return `values` with random text that makes their length a multiple of `PADDED_BYTES`."""
    filled = {**values, "obfuscation": ""}
    missing = -len(event(filled, write).encode()) % PADDED_BYTES
    return {**filled, "obfuscation": secrets.token_hex(missing)[:missing]}


async def chained(
    first: tuple[int, Output], rest: AsyncIterator[tuple[int, Output]]
) -> AsyncIterator[tuple[int, Output]]:
    """Yield the first output and the rest."""
    yield first
    async for indexed in rest:
        yield indexed
