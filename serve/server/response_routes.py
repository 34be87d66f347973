"""Routes of OpenAI's responses."""

import asyncio
import logging
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from serve.completion import piece_of
from serve.openai.responses.body import ResponseBody
from serve.openai.responses.items import Item
from serve.openai.responses.store import earlier_items
from serve.openai.responses.writer import ResponseWriter
from serve.request import Output
from serve.server.completion_routes import (
    STREAM_HEADERS,
    named_model,
    response_in_pieces,
    start_answer,
    unless_gone,
    with_last_events,
)
from serve.server.exchange import exchange_of
from serve.server.replicas.slices import json_slices, pieces, sliced_line
from serve.server.service import Service
from serve.server.streams import Answer, chained, padded
from serve.server.streams import event as write_event
from stu.common.errors import UserError
from stu.common.text import Json, require_unicode

logger = logging.getLogger("stu")

MOST_LISTED = 100


def add_response_routes(app: FastAPI, service: Service) -> None:
    """Add `/v1/responses` and what concerns stored ones."""
    _add_create(app, service)
    _add_stored(app, service)


def _add_create(app: FastAPI, service: Service) -> None:
    @app.post("/v1/responses")
    async def create(body: ResponseBody, request: Request) -> Response:
        exchange = exchange_of(request.scope)
        if exchange.is_background:  # a row of a batch, whose results are files
            body = body.model_copy(update={"store": False})
        model = named_model(service, body.model, request)
        whole = await _with_history(service, body, request)
        async with model.entered(exchange.is_background) as version:
            endpoint = version.responses
            answer = await start_answer(service, model, version, endpoint, whole, request)
        writer = endpoint.writer(
            secrets.token_hex(24), int(time.time()), body, answer.streams[0].request
        )

        async def save() -> None:
            """Store the response, or say in it that it is not stored."""
            if body.store is False:
                return
            arguments = (
                exchange.owner,
                writer.response,
                _numbered(body.items, writer.response["id"]),
            )
            try:
                add = service.stored.add
                is_stored = await service.threads.run(exchange.client, add, *arguments)
            except sqlite3.OperationalError as error:  # a full disk
                logger.warning("%s is not stored: %s", writer.response["id"], error)
                is_stored = False
            writer.response["store"] = is_stored

        outputs = answer.outputs(keeps_logprobs=False)
        try:
            if not body.stream:
                whole_answer = _whole(answer, outputs, writer, save)
                return response_in_pieces(await unless_gone(request, whole_answer))
            first = await unless_gone(request, anext(outputs))
        except UserError as error:  # of the engine
            raise endpoint.in_client_names(error, body) from error
        options = body.stream_options
        is_padded = options is not None and bool(options.include_obfuscation)
        events = _events(answer, first, outputs, writer, save)
        texts = with_last_events(answer, outputs, events, writer.fail)
        return StreamingResponse(
            _sent(texts, is_padded, body.has_logprobs),
            media_type="text/event-stream",
            headers=STREAM_HEADERS,
        )

    @app.post("/v1/responses/input_tokens")
    async def input_tokens(body: ResponseBody, request: Request) -> Json:
        model = named_model(service, body.model, request)
        whole = await _with_history(service, body, request)
        client, endpoint = exchange_of(request.scope).client, model.current.responses
        (counted,) = await service.threads.run(client, endpoint.requests, 0, whole)
        count = len(counted.prompt_token_ids)
        return {"object": "response.input_tokens", "input_tokens": count}


def _add_stored(app: FastAPI, service: Service) -> None:
    stored = service.stored

    @app.get("/v1/responses/{response_id}")
    async def retrieve(response_id: str, request: Request, stream: bool = False) -> Response:
        if stream:
            raise UserError("stream", True, fix="a stored response is whole, leave it out")
        exchange = exchange_of(request.scope)
        # As it is stored: to parse tens of MB would hold up all other requests.
        text = await service.threads.run(
            exchange.client, stored.response, exchange.owner, response_id
        )
        return Response(text, media_type="application/json")

    @app.delete("/v1/responses/{response_id}")
    async def delete(response_id: str, request: Request) -> Json:
        exchange = exchange_of(request.scope)
        await service.threads.run(exchange.client, stored.delete, exchange.owner, response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str) -> Json:
        fix = "only responses in the background can be cancelled, and there are none"
        raise UserError("response_id", response_id, fix=fix)

    @app.get("/v1/responses/{response_id}/input_items")
    async def input_items(
        response_id: str,
        request: Request,
        after: str | None = None,
        limit: int = 20,
        order: str = "desc",
    ) -> Json:
        if not 1 <= limit <= MOST_LISTED:
            raise UserError("limit", limit, f"from 1 to {MOST_LISTED}")
        if order not in ("asc", "desc"):
            raise UserError("order", order, "asc or desc")
        exchange = exchange_of(request.scope)
        items = await service.threads.run(
            exchange.client, stored.items, exchange.owner, response_id
        )
        if order == "desc":
            items.reverse()
        ids = [item["id"] for item in items]
        if after is not None and after not in ids:
            raise UserError("after", after, "the id of an item of this response")
        begin = 0 if after is None else ids.index(after) + 1
        page = items[begin : begin + limit]
        return {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": begin + limit < len(items),
        }


async def _with_history(service: Service, body: ResponseBody, request: Request) -> ResponseBody:
    """Return the body with the items of the responses that it follows before its own."""
    if body.previous_response_id is None:
        return body
    exchange, previous_id = exchange_of(request.scope), body.previous_response_id
    require_unicode("previous_response_id", previous_id)

    arguments = service.stored, exchange.owner, previous_id, len(body.items)
    earlier = await service.threads.run(exchange.client, earlier_items, *arguments)
    return body.model_copy(update={"input": [*earlier, *body.items]})


async def _whole(
    answer: Answer,
    outputs: AsyncIterator[tuple[int, Output]],
    writer: ResponseWriter,
    save: Callable[[], Awaitable[None]],
) -> list[bytes]:
    writer.begin()
    output = Output(0)
    async for _, output in outputs:
        writer.write(piece_of(output))
    writer.end(answer.usage(), output.finish_reason == "length", int(time.time()))
    await save()
    return await asyncio.to_thread(lambda: list(pieces(json_slices(writer.response))))


async def _events(
    answer: Answer,
    first: tuple[int, Output],
    rest: AsyncIterator[tuple[int, Output]],
    writer: ResponseWriter,
    save: Callable[[], Awaitable[None]],
) -> AsyncIterator[Json]:
    for event in writer.begin():
        yield event
    output = first[1]
    async for _, output in chained(first, rest):
        for event in writer.write(piece_of(output)):
            yield event
    last = writer.end(answer.usage(), output.finish_reason == "length", int(time.time()))
    # Before its client may ask for it.
    await save()
    last[-1]["response"]["store"] = writer.response["store"]
    for event in last:
        yield event


async def _sent(
    events: AsyncIterator[Json], is_padded: bool, has_logprobs: bool
) -> AsyncIterator[str]:
    async for event in events:
        if "delta" in event:
            text = write_event(padded(event) if is_padded else event)
        elif has_logprobs:  # those of a whole text may take seconds
            text = await asyncio.to_thread(write_event, event, sliced_line)
        else:
            text = write_event(event)
        yield f"event: {event['type']}\n{text}"


def _numbered(items: Sequence[Item], response_id: str) -> list[Json]:
    suffix = response_id.partition("_")[2]
    return [item.written(f"{item.prefix}_{suffix}_in{index}") for index, item in enumerate(items)]
