"""Routes about the model, its tokenizer, and the state of the server."""

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from serve.openai.errors import error_body
from serve.openai.schemas import DetokenizeBody, TokenizeBody
from serve.server.completion_routes import named_model, response_in_pieces
from serve.server.exchange import exchange_of
from serve.server.replicas.slices import json_slices, pieces
from serve.server.served_model import ServedModel
from serve.server.service import Service
from stu.common.errors import UserError
from stu.common.text import Json
from stu.tokenizer import Tokenizer, encode_text


def add_information_routes(app: FastAPI, service: Service) -> None:
    """Add the routes that clients and operators ask about the server."""
    _add_models(app, service)
    _add_tokenizer(app, service)
    _add_state(app, service)


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [await model(name) for name in service.names]}

    @app.get("/v1/models/{name:path}")  # names may contain slashes
    async def model(name: str) -> Json:
        found = service.find(name)
        return {
            "id": name,
            "parent": None if name == found.name else found.name,
            "object": "model",
            "created": found.current.loaded,
            "owned_by": "stu",
            "max_model_len": found.current.model.max_seq_len,
            **_num_replicas([found]),
        }


def _add_tokenizer(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        version = named_model(service, body.model, request).current
        tokenizer = version.tokenizer

        def tokenized() -> list[bytes]:
            tokens = _tokens(tokenizer, body.prompt)
            if body.add_special_tokens:
                tokens = tokenizer.start_ids + tokens
            length = version.model.max_seq_len
            values = {"tokens": tokens, "count": len(tokens), "max_model_len": length}
            return list(pieces(json_slices(values)))

        client = exchange_of(request.scope).client
        return response_in_pieces(await service.threads.run(client, tokenized))

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody, request: Request) -> Response:
        tokenizer = named_model(service, body.model, request).current.tokenizer
        if (largest := max(body.tokens, default=0)) >= tokenizer.vocab_size:
            allowed = f"a list of ids from 0 to {tokenizer.vocab_size - 1}, not {largest}"
            raise UserError("tokens", allowed=allowed)
        client = exchange_of(request.scope).client
        text = await service.threads.run(client, tokenizer.decode, body.tokens)
        return response_in_pieces(list(pieces(json_slices({"prompt": text}))))

    @app.get("/tokenizer_info")
    async def tokenizer_info(request: Request, model: str | None = None) -> Json:
        tokenizer = named_model(service, model, request).current.tokenizer
        special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        return {
            name: tokenizer.token_text(token) if token >= 0 else None
            for name, token in special.items()
        } | {"pad_token": None, "vocab_size": tokenizer.vocab_size}


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health(request: Request, model: str | None = None) -> Response:
        """Whether a model, or the one that is named, has a replica that responds."""
        found = asked(model)
        failure = "loading the model" if is_loading(found) else "no replica responds"
        # A restart of the server would end the streams of the models that respond, and is not
        # needed where the only replica is exchanged for one of another version.
        is_good = any(own.replicas.is_healthy or not own.is_open.is_set() for own in found)
        return _state(request, is_good, failure, found)

    @app.get("/ready")
    async def ready(request: Request, model: str | None = None) -> Response:
        """Whether each model, or the one that is named, takes requests."""
        found = asked(model)
        failure = "loading the model" if is_loading(found) else "no replica is ready"
        failure = "draining" if service.is_draining else failure
        is_good = all(own.replicas.is_healthy for own in found)
        return _state(request, is_good and not service.is_draining, failure, found)

    @app.get("/version")
    async def version() -> Json:
        return {"version": service.version}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    def asked(name: str | None) -> Sequence[ServedModel]:
        if name is None:
            return service.models
        if name not in service.names:  # these are for those who have a key
            raise UserError("model", name, "the name of a model here", code="model_not_found")
        return [service.find(name)]

    def is_loading(models: Sequence[ServedModel]) -> bool:
        return any(model.replicas.is_loading for model in models)


def _state(
    request: Request, is_good: bool, failure: str, models: Sequence[ServedModel]
) -> Response:
    """Return the answer of a probe about these models, which it does not name."""
    status, code = ("ok", 200) if is_good else (failure, 503)
    if not is_good:
        exchange_of(request.scope).refuse(error_body(failure, "server_error"))
    return JSONResponse({"status": status, **_num_replicas(models)}, code)


def _num_replicas(models: Sequence[ServedModel]) -> dict[str, int]:
    """Return how many replicas there are to be, and how many of them take requests."""
    current = [model.current.replicas for model in models]
    return {
        "replicas": sum(map(len, current)),
        "replicas_ready": sum(len(replicas.stats) for replicas in current),
    }


def _tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a text. The name of BOS or EOS alone means that token, as evaluation
    harnesses expect."""
    for token in (tokenizer.bos_id, tokenizer.eos_id):
        if token >= 0 and text == tokenizer.token_text(token):
            return [token]
    return encode_text(tokenizer, "prompt", text)
