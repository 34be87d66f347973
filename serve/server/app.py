"""The HTTP server's routes: OpenAI's completions, and what operators ask."""

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from serve.openai.body_errors import body_error
from serve.openai.chat import ChatTemplate
from serve.openai.chat_body import text_body
from serve.openai.chat_choices import ChatChoiceWriter
from serve.openai.completions import Completions, in_openai_words, prompts_of
from serve.openai.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    StreamOptions,
    TokenizeBody,
    error_body,
)
from serve.request import Request as EngineRequest
from serve.request import check_request
from serve.sampling.grammar import Grammars
from serve.server.arrivals import EngineError
from serve.server.config import ServerConfig
from serve.server.exchange import FAULT, Exchange, exchange_of
from serve.server.json_body import JsonRoute
from serve.server.metrics import Metrics
from serve.server.page import add_playground
from serve.server.replicas.dispatch import Busy, Refused, Replicas, Unavailable
from serve.server.slices import Threads, json_slices, pieces
from serve.server.streams import Answer, TimedOut, event
from stu.common.errors import UserError, show
from stu.common.text import Json, require_unicode
from stu.config import ModelConfig
from stu.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FIELD = re.compile(r"^(?:(?:unknown )?field \")?([a-z_]+)[\"=. ]")
RETRY_SECONDS = "1"


@dataclass
class Service:
    """What the routes work with."""

    config: ServerConfig
    replicas: Replicas
    metrics: Metrics
    tokenizer: Tokenizer
    completions: Completions
    template: ChatTemplate
    grammars: Grammars
    version: str
    model: ModelConfig
    default_new_tokens: int
    """Of a chat, if it says none and there is room."""
    is_draining: bool = False
    started: int = 0
    """Unix time."""
    threads: Threads = field(default_factory=Threads)


class RequestError(Exception):
    """To be answered with a status and OpenAI's error."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    def body(self) -> Any:
        """Of the answer."""
        return error_body(str(self), self.kind, self.param, self.code)


def make_app(service: Service) -> FastAPI:
    """The routes."""
    app = FastAPI(
        title="stu",
        version=service.version,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        # A redirect would lead to whatever host the request names.
        redirect_slashes=False,
    )
    app.router.route_class = JsonRoute
    _add_errors(app)
    _add_completions(app, service)
    _add_information(app, service)
    add_playground(app)
    return app


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        exchange = exchange_of(request.scope)
        await service.threads.run(exchange.client, _check_body, body)
        given = _without_stream(body.model_dump(exclude_none=True))
        answer = await _begin(service, exchange, given, "cmpl", "text_completion", None)
        return await _answered(service, request, body, answer)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        exchange = exchange_of(request.scope)
        await service.threads.run(exchange.client, _check_body, body)
        _check_model(service, body.model)
        with _as_request_error():
            # Not here, where a long chat would hold up the streams of others.
            given = await service.threads.run(
                exchange.client,
                text_body,
                body,
                service.template,
                service.model.max_seq_len,
                service.default_new_tokens,
            )
        given = _without_stream(given)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        answer = await _begin(service, exchange, given, "chatcmpl", kind, bool(body.stream))
        return await _answered(service, request, body, answer)


def _add_information(app: FastAPI, service: Service) -> None:
    config, tokenizer = service.config, service.tokenizer

    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [await model(config.name)]}

    @app.get("/v1/models/{name:path}")  # names may have slashes
    async def model(name: str) -> Json:
        _check_model(service, name)
        found = {"id": config.name, "object": "model", "created": service.started}
        return {**found, "owned_by": "stu", "max_model_len": service.model.max_seq_len}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        _check_model(service, body.model)

        def tokenized() -> list[bytes]:
            tokens = _tokens(tokenizer, body.prompt)
            if body.add_special_tokens:
                tokens = [tokenizer.bos_id, *tokens]
            length = service.model.max_seq_len
            values = {"tokens": tokens, "count": len(tokens), "max_model_len": length}
            return list(pieces(json_slices(values)))

        with _as_request_error():
            client = exchange_of(request.scope).client
            return _in_pieces(await service.threads.run(client, tokenized))

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody, request: Request) -> Response:
        _check_model(service, body.model)
        if max(body.tokens, default=0) >= tokenizer.vocab_size:
            raise _refused(
                f"tokens has the id {max(body.tokens)}, and the vocabulary ids 0 to "
                f"{tokenizer.vocab_size - 1}"
            )
        client = exchange_of(request.scope).client
        text = await service.threads.run(client, tokenizer.decode, body.tokens)
        return _in_pieces(list(pieces(json_slices({"prompt": text}))))

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Json:
        names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        return {
            name: tokenizer.token_text(token) if token >= 0 else None
            for name, token in names.items()
        } | {"pad_token": None, "vocab_size": tokenizer.vocab_size}

    @app.get("/health")
    async def health() -> Response:
        is_healthy, is_loading = service.replicas.is_healthy, service.replicas.is_loading
        failure = "loading the model" if is_loading else "no engine gives a sign of life"
        return JSONResponse({"status": "ok" if is_healthy else failure}, 200 if is_healthy else 503)

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = service.replicas.is_healthy and not service.is_draining
        failure = "loading the model" if service.replicas.is_loading else "no engine is ready"
        status = "ok" if is_ready else "draining" if service.is_draining else failure
        return JSONResponse({"status": status}, 200 if is_ready else 503)

    @app.get("/version")
    async def version() -> Json:
        return {"version": service.version}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def _begin(
    service: Service,
    exchange: Exchange,
    given: Json,
    prefix: str,
    kind: str,
    is_chat_stream: bool | None,
) -> Answer:
    """Requests on their way. is_chat_stream: None for text."""
    if service.is_draining:
        raise Unavailable("the server is about to stop: try another")
    _check_model(service, given.get("model"))
    arrived = time.monotonic()
    with _as_request_error("prompt" if is_chat_stream is None else "messages"):
        # Long prompts and large schemas must not hold up the streams of others.
        requests, writers, prompts = await service.threads.run(
            exchange.client, _prepared, service, given, is_chat_stream
        )
    frame = {
        "id": f"{prefix}-{exchange.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": service.config.name,
    }
    num_prompt_tokens = sum(len(its.prompt_token_ids) for its in requests[:: given.get("n") or 1])
    timeout = service.config.request_timeout_seconds
    # At last, when nothing can fail any more before somebody reads what comes.
    streams = service.replicas.submit(requests, exchange.client)
    return Answer(
        service.replicas,
        service.metrics,
        streams,
        writers,
        frame,
        num_prompt_tokens,
        timeout,
        arrived,
        exchange,
        prompts,
    )


def _check_model(service: Service, model: str | None) -> None:
    if model is not None and model != service.config.name:
        message = (
            f"model={show(model)} does not exist here: it must be {json.dumps(service.config.name)}"
        )
        raise RequestError(404, message, "invalid_request_error", "model", "model_not_found")


def _prepared(
    service: Service, given: Json, is_chat_stream: bool | None
) -> tuple[list[EngineRequest], Any, list[str] | None]:
    """Requests, the writers of their choices, and the prompts for the log if it is to have them."""
    requests = _requests(service, given)
    if is_chat_stream is None:
        writers: Any = service.completions.writers(given, requests)
    else:
        writers = [
            ChatChoiceWriter(service.tokenizer, request, index, is_chat_stream)
            for index, request in enumerate(requests)
        ]
    if not service.config.log_prompts:
        return requests, writers, None
    of_each = requests[:: given.get("n") or 1]
    return (
        requests,
        writers,
        [service.tokenizer.decode(request.prompt_token_ids) for request in of_each],
    )


def _requests(service: Service, given: Json) -> list[EngineRequest]:
    count = given.get("n") or 1
    num_choices = len(prompts_of(given["prompt"])) * count
    # More than may wait would be told to come again, for ever.
    most = min(service.config.max_choices, service.config.max_waiting)
    if num_choices > most:
        raise ValueError(
            f"n={count} completions of each prompt are {num_choices}, and a request may ask for "
            f"{most}: ask for fewer at once"
        )
    requests = service.completions.requests(secrets.randbits(32), given)
    for its in requests:
        check_request(its, service.model)
    for constraint in {its.sampling.constraint for its in requests}:
        if constraint is not None:
            service.grammars.check(constraint)
    return requests


async def _answered(service: Service, request: Request, body: Any, answer: Answer) -> Response:
    if not body.stream:
        return _in_pieces(await _unless_gone(request, answer.whole()))
    outputs = answer.outputs(keeps_logprobs=False)
    first = await _unless_gone(request, anext(outputs))
    events = answer.events(first, outputs, body.stream_options or StreamOptions())
    return StreamingResponse(
        _guarded(outputs, events),
        media_type="text/event-stream",
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
    )


def _in_pieces(body: list[bytes]) -> Response:
    """Return a response that forgets each piece of JSON once it is sent."""
    length = sum(map(len, body))
    body.reverse()

    async def taken() -> AsyncIterator[bytes]:
        while body:
            yield body.pop()

    headers = {"content-length": str(length)}
    return StreamingResponse(taken(), media_type="application/json", headers=headers)


async def _guarded(outputs: Any, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Events, until one is an error."""
    try:
        async for each in events:
            yield each
    except (Refused, Unavailable, EngineError, TimedOut) as error:
        kind = "invalid_request_error" if isinstance(error, Refused) else "server_error"
        yield event(error_body(in_openai_words(str(error)), kind))
    finally:
        await outputs.aclose()


async def _unless_gone(request: Request, work: Any) -> Any:
    """What comes of `work`, which ends when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError(499, "the client went away", "invalid_request_error")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_body(body: Any) -> None:
    """Whatever can be wrong with a body is found before its requests begin: nobody would read
    them."""
    if body.stream_options is not None and not body.stream:
        raise _refused("stream_options goes with stream=true alone: leave it out")
    with _as_request_error():
        for name, value in body.model_dump(exclude_none=True).items():
            for text in json_slices(value):
                require_unicode(name, text)


def _without_stream(given: Json) -> Json:
    """Return a body's fields without those that say how to answer."""
    return {name: its for name, its in given.items() if name not in ("stream", "stream_options")}


def _tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Of a text; the name of BOS or EOS alone stands for that, as evaluation harnesses expect."""
    for token in (tokenizer.bos_id, tokenizer.eos_id):
        if token >= 0 and text == tokenizer.token_text(token):
            return [token]
    return tokenizer.encode(text)


class _as_request_error:
    """A ValueError in here is the client's. `prompt`: the field that its prompt comes from."""

    def __init__(self, prompt: str = "prompt") -> None:
        self._prompt = prompt

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError) and error.code:
            raise _refused(str(error), self._prompt, error.code) from error
        if isinstance(error, ValueError):
            raise _refused(str(error)) from error


def _refused(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    text = in_openai_words(message)
    if param is None and (match := FIELD.match(text)):
        param = "response_format" if match[1] in ("json_schema", "regex") else match[1]
    return RequestError(400, text, "invalid_request_error", param, code)


def _add_errors(app: FastAPI) -> None:
    def answered(request: Request, status: int, body: Any, **headers: str) -> Response:
        exchange_of(request.scope).refuse(body)
        # In ASCII: a message may name what no UTF-8 can hold.
        content = json.dumps(body)
        return Response(content, status, headers, media_type="application/json")

    def handles(kind: type[Exception]) -> Callable[[Any], Any]:
        return app.exception_handler(kind)

    @handles(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return answered(request, error.status, error.body())

    @handles(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first, place = error.errors()[0], error.errors()[0]["loc"][1:]
        if not place and first["type"] == "value_error":
            return answered(request, 400, _refused(str(first["ctx"]["error"])).body())
        if not place or first["type"] == "json_invalid":
            message = (
                "the body must be a JSON object, with the header content-type: application/json: "
                f"{first.get('ctx', {}).get('error', first['msg'])}"
            )
            return answered(request, 400, error_body(message, "invalid_request_error"))
        message, param = body_error([{**its, "loc": its["loc"][1:]} for its in error.errors()])
        return answered(request, 400, error_body(message, "invalid_request_error", param))

    @handles(Refused)
    async def refused_by_engine(request: Request, error: Refused) -> Response:
        return answered(request, 400, _refused(str(error)).body())

    @handles(TimedOut)
    async def timed_out(request: Request, error: TimedOut) -> Response:
        return answered(request, 504, error_body(str(error), "server_error", code="timeout"))

    @handles(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        body = error_body(str(error), "rate_limit_error", code="rate_limit_exceeded")
        return answered(request, 429, body, **{"retry-after": RETRY_SECONDS})

    @handles(Unavailable)
    async def unavailable(request: Request, error: Unavailable) -> Response:
        body = error_body(str(error), "server_error", code="unavailable")
        return answered(request, 503, body, **{"retry-after": RETRY_SECONDS})

    @handles(EngineError)
    async def engine_error(request: Request, error: EngineError) -> Response:
        return answered(request, 500, error_body(in_openai_words(str(error)), "server_error"))

    @handles(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        body = error_body(message[:500], "invalid_request_error")
        return answered(request, error.status_code, body, **(error.headers or {}))

    @handles(Exception)
    async def fault(request: Request, _: Exception) -> Response:
        # The exception itself goes on to the log.
        return answered(request, 500, error_body(FAULT, "server_error"))
