"""OpenAI's embeddings: from a body to engine requests, and back to the body of an answer."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from serve.completion import Completion, normalized
from serve.openai.endpoint import Endpoint, request_fields
from serve.openai.schemas import EmbeddingBody
from serve.prompts import encode_prompt, listed_prompts
from serve.request import Request
from serve.sampling_params import SamplingParams
from stu.common.errors import UserError
from stu.common.text import Json


class Embeddings(Endpoint[EmbeddingBody]):
    """Bodies of `/v1/embeddings`.

    Args:
        width: Number of dimensions of the model's embeddings.
        settings: Arguments of `Endpoint`.
    """

    body_type, list_name = EmbeddingBody, "data"
    operation = "embeddings"
    client_names: ClassVar[Mapping[str, str]] = {"prompt": "input"}

    def __init__(self, width: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._width = width

    def writers(self, body: EmbeddingBody, requests: Sequence[Request]) -> "list[EmbeddingWriter]":
        """Return a writer for each embedding."""
        return [EmbeddingWriter(body, index) for index in range(len(requests))]

    def frame(self, answer_id: str, created: int, body: EmbeddingBody) -> Json:
        """Return an answer without its embeddings and its usage."""
        return {"object": "list", "model": body.model or self._model_name}

    def _requests(self, number: int, body: EmbeddingBody) -> list[Request]:
        inputs, most = listed_prompts(body.input), self._max_choices
        if body.input == []:
            raise UserError("input", [], "a text or a list of at least one token id or text")
        if most is not None and len(inputs) > most:
            fix = f"a body may have {most} inputs, not {len(inputs)}: send several"
            raise UserError("input", fix=fix)
        if body.dimensions not in (None, self._width):
            allowed = f"{self._width}, the model's width, or left out"
            raise UserError("dimensions", body.dimensions, allowed)
        kept, more = self._truncation(body, 0), request_fields(body)
        nothing_new = SamplingParams(max_new_tokens=0, truncate_prompt_tokens=kept)
        prompts = [encode_prompt(self._tokenizer, text) for text in inputs]
        return [Request(prompt, nothing_new, pooling=body.pooling, **more) for prompt in prompts]


class EmbeddingWriter:
    """Writes embedding number `index` of an answer."""

    def __init__(self, body: EmbeddingBody, index: int) -> None:
        self._body, self._index = body, index

    def write(self, piece: Completion) -> Json:
        """Return the embedding."""
        values: Sequence[float] = piece.embedding
        if self._body.normalize:
            values = normalized(values)
        is_packed = self._body.encoding_format == "base64"
        return {
            "object": "embedding",
            "index": self._index,
            "embedding": _base64(values) if is_packed else list(values),
        }


def _base64(values: Sequence[float]) -> str:
    """Return float32 numbers, little-endian, in Base64."""
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()
