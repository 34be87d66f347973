"""Routes of OpenAI's completions and embeddings."""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException

from serve.openai.choices import ChoiceWriter
from serve.openai.endpoint import Endpoint
from serve.openai.schemas import (
    AnyBody,
    ChatBody,
    CompletionBody,
    CompletionSettings,
    EmbeddingBody,
    StreamOptions,
    TextScoreBody,
)
from serve.request import MOST_PRIORITY, check_request
from serve.request import Request as EngineRequest
from serve.server.access.limits import UNLIMITED, Charge, RateLimited
from serve.server.error_answers import error_answer
from serve.server.exchange import Exchange, exchange_of
from serve.server.model_version import ModelVersion
from serve.server.replicas.stream import Busy, EngineError, Unavailable
from serve.server.served_model import ServedModel
from serve.server.service import Service
from serve.server.streams import Answer, TimedOut, event
from stu.common.errors import UserError
from stu.common.text import Json

logger = logging.getLogger(__name__)

STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
Event = TypeVar("Event")


def add_completion_routes(app: FastAPI, service: Service) -> None:
    """Add `/v1/completions`, `/v1/chat/completions`, `/v1/embeddings` and `/score`."""

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await _answer(
            service, lambda version: version.completions, body, request, _stream(body)
        )

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        return await _answer(service, lambda version: version.chats, body, request, _stream(body))

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        return await _answer(service, lambda version: version.embeddings, body, request, None)

    @app.post("/score")
    @app.post("/v1/score")
    async def score(body: TextScoreBody, request: Request) -> Response:
        return await _answer(service, lambda version: version.text_scores, body, request, None)


def _stream(body: CompletionSettings) -> StreamOptions | None:
    """Return the options of the stream that a body asks for, or None."""
    return body.stream_options or StreamOptions() if body.stream else None


async def _answer(
    service: Service,
    endpoint_of: Callable[[ModelVersion], Endpoint[AnyBody]],
    body: AnyBody,
    request: Request,
    stream: StreamOptions | None,
) -> Response:
    model = named_model(service, body.model, request)
    async with model.entered(exchange_of(request.scope).is_background) as version:
        endpoint = endpoint_of(version)
        answer = await start_answer(service, model, version, endpoint, body, request)
        try:
            if stream is None:
                return response_in_pieces(await unless_gone(request, answer.whole()))
            return await _streamed(answer, stream, request)
        except UserError as error:  # of the engine
            raise endpoint.in_client_names(error, body) from error


def named_model(service: Service, name: str | None, request: Request) -> ServedModel:
    """Return the model that a request names, and note it for the log and metrics. Raises
    UserError."""
    model = service.find(name)
    exchange_of(request.scope).model = model.name
    return model


async def start_answer(
    service: Service,
    model: ServedModel,
    version: ModelVersion,
    endpoint: Endpoint[AnyBody],
    body: AnyBody,
    request: Request,
) -> Answer:
    """Submit the requests of a body, and return the answer that they will have."""
    arrived = time.monotonic()
    if service.is_draining:
        raise Unavailable("the server is stopping: send the request to another one")
    exchange = exchange_of(request.scope)
    fields: Json = {"client": exchange.client}
    if body.model in model.adapters:
        fields["adapter"] = body.model
    seconds = service.config.request_timeout_seconds
    if exchange.is_background:
        fields["priority"], seconds = MOST_PRIORITY, math.inf
    # In a thread: a long prompt or a large schema would hold up the streams of others.
    requests, writers, prompts = await service.threads.run(
        exchange.client, _prepare, version, endpoint, body, fields, service.config.log_prompts
    )
    num_prompt_tokens = endpoint.num_prompt_tokens(body, requests)
    try:
        charge = _charge(service, model, exchange, num_prompt_tokens, requests)
    except UserError as error:
        raise endpoint.in_client_names(error, body) from error
    try:
        # Last, when nothing can fail any more before somebody reads the outputs.
        streams = version.replicas.submit(requests, exchange.client, exchange.is_background)
    except (Busy, Unavailable):
        charge.settle(0)
        raise
    return Answer(
        replicas=version.replicas,
        metrics=model.metrics,
        endpoint=endpoint,
        body=body,
        streams=streams,
        writers=writers,
        frame=endpoint.frame(exchange.request_id, int(time.time()), body),
        num_prompt_tokens=num_prompt_tokens,
        timeout_seconds=seconds,
        arrived=arrived,
        exchange=exchange,
        on_end=partial(_ended, service, endpoint.operation, charge),
        prompts=prompts,
    )


def _charge(
    service: Service,
    model: ServedModel,
    exchange: Exchange,
    num_prompt_tokens: int,
    requests: Sequence[EngineRequest],
) -> Charge:
    """Charge a client for all tokens of a body. Rows of batches have no limits, as all others go
    first. Raises RateLimited or UserError."""
    if exchange.is_background:
        return UNLIMITED
    new_tokens = sum(request.sampling.max_new_tokens for request in requests)
    num_tokens = num_prompt_tokens + new_tokens
    try:
        return service.limits.charge(exchange.client, exchange.key, num_tokens, exchange.headers)
    except UserError as error:
        raise error.renamed("max_new_tokens" if new_tokens else "prompt") from error
    except RateLimited:
        if exchange.key is not None:
            model.metrics.count_limited(exchange.key.name)
        raise


def _ended(service: Service, operation: str, charge: Charge, answer: Answer) -> None:
    """Give a client back what it did not use, count the rest for its key, and send the trace."""
    usage = answer.usage()
    if service.tracing is not None:
        exchange = answer.exchange
        names = operation, answer.frame["model"], exchange.request_id
        service.tracing.record(*names, exchange.trace_context, answer)
    charge.settle(usage["total_tokens"])
    if (key := answer.exchange.key) is not None:
        answer.metrics.count_use(key.name, usage["prompt_tokens"], usage["completion_tokens"])


def _prepare(
    version: ModelVersion,
    endpoint: Endpoint[AnyBody],
    body: AnyBody,
    fields: Json,
    log_prompts: bool,
) -> tuple[list[EngineRequest], Sequence[ChoiceWriter], list[str] | None]:
    """Return the requests of a body, with further fields, the writers of their choices, and the
    prompts if the log is to have them."""
    requests = endpoint.requests(secrets.randbits(32), body)
    requests = [replace(request, **fields) for request in requests]
    first_of_prompts = requests[:: endpoint.choices_per_prompt(body)]
    num_right = 0
    try:
        for request in first_of_prompts:
            check_request(request, version.model)
            num_right += 1
    except UserError as error:
        raise endpoint.about_prompt(error, body, num_right) from error
    if (constraint := requests[0].sampling.constraint) is not None:
        try:
            version.grammars.check(constraint)
        except UserError as error:
            field = endpoint.constraint_field(body, error.field)
            raise UserError(field, constraint.source, message=str(error)) from error
    writers = endpoint.writers(body, requests)
    if not log_prompts:
        return requests, writers, None
    prompts = [version.tokenizer.decode(request.prompt_token_ids) for request in first_of_prompts]
    return requests, writers, prompts


async def _streamed(answer: Answer, options: StreamOptions, request: Request) -> Response:
    outputs = answer.outputs(keeps_logprobs=False)
    first = await unless_gone(request, anext(outputs))
    events = answer.events(first, outputs, options)
    return StreamingResponse(
        with_last_events(answer, outputs, events, lambda error: [event(error)]),
        media_type="text/event-stream",
        headers=STREAM_HEADERS,
    )


def response_in_pieces(body: list[bytes]) -> Response:
    """Return a response of JSON that frees each piece once it is sent."""
    length = sum(map(len, body))
    body.reverse()

    async def pieces() -> AsyncIterator[bytes]:
        while body:
            yield body.pop()

    headers = {"content-length": str(length)}
    return StreamingResponse(pieces(), media_type="application/json", headers=headers)


async def with_last_events(
    answer: Answer,
    outputs: Any,
    events: AsyncIterator[Event],
    last: Callable[[Json], Iterable[Event]],
) -> AsyncIterator[Event]:
    """Yield events; after an error in mid-stream, those that `last` makes of its body."""
    try:
        async for found in events:
            yield found
    except Exception as error:
        if not isinstance(error, UserError | Unavailable | EngineError | TimedOut):
            fields = {"request_id": answer.exchange.request_id}
            logger.exception("a stream failed", extra={"fields": fields})
        for found in last(error_answer(error)[1]):
            yield found
    finally:
        await outputs.aclose()


async def unless_gone(request: Request, work: Any) -> Any:
    """Return the result of `work`, which is cancelled when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client went away")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
