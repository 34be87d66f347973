"""vLLM's scores of pairs of texts: the cosine of the angle between their embeddings."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from serve.completion import Completion, normalized
from serve.openai.choices import ChoiceWriter
from serve.openai.endpoint import Endpoint, request_fields
from serve.openai.schemas import TextScoreBody
from serve.prompts import encode_prompt, listed_prompts
from serve.request import Request
from serve.sampling_params import SamplingParams
from stu.common.errors import UserError
from stu.common.text import Json


class TextScores(Endpoint[TextScoreBody]):
    """Bodies of `/score`. A text of `text_1` belongs to each of `text_2`, or one to all."""

    body_type, list_name = TextScoreBody, "data"
    operation = "score"
    client_names: ClassVar[Mapping[str, str]] = {"prompt": "text_1"}

    def about_prompt(self, error: UserError, body: TextScoreBody, index: int) -> UserError:
        """See `Endpoint.about_prompt`."""
        if error.field != "prompt":
            return self.in_client_names(error, body)
        return error.renamed("text_1" if index < len(listed_prompts(body.text_1)) else "text_2")

    def writers(self, body: TextScoreBody, requests: Sequence[Request]) -> list[ChoiceWriter]:
        """Return nothing, as no result is that of one request."""
        return []

    def results(
        self,
        body: TextScoreBody,
        writers: Sequence[ChoiceWriter],
        completions: Iterable[Completion],
    ) -> Iterator[Json]:
        """See `Endpoint.results`."""
        vectors = [normalized(completion.embedding) for completion in completions]
        num_first = len(listed_prompts(body.text_1))
        first, second = vectors[:num_first], vectors[num_first:]
        first *= len(second) // num_first
        for index, pair in enumerate(zip(first, second, strict=True)):
            score = math.fsum(one * other for one, other in zip(*pair, strict=True))
            yield {"index": index, "object": "score", "score": score}

    def frame(self, answer_id: str, created: int, body: TextScoreBody) -> Json:
        """Return an answer without its scores and its usage."""
        return {
            "id": f"score-{answer_id}",
            "object": "list",
            "created": created,
            "model": body.model or self._model_name,
        }

    def _requests(self, number: int, body: TextScoreBody) -> list[Request]:
        texts: dict[str, list[Any]] = {}
        for name in ("text_1", "text_2"):
            value = getattr(body, name)
            if value == []:
                raise UserError(name, [], "a text or a list of at least one token id or text")
            texts[name] = listed_prompts(value)
        num_first, num_second = len(texts["text_1"]), len(texts["text_2"])
        if num_first not in (1, num_second):
            fix = f"it has {num_first} texts and text_2 {num_second}: give one, or one for each"
            raise UserError("text_1", fix=fix)
        most = self._max_choices
        if most is not None and num_first + num_second > most:
            fix = f"a body may have {most} texts, not {num_first + num_second}: send several"
            raise UserError("text_2", fix=fix)
        kept, more = self._truncation(body, 0), request_fields(body)
        nothing_new = SamplingParams(max_new_tokens=0, truncate_prompt_tokens=kept)
        requests = []
        for name, listed in texts.items():
            try:
                prompts = [encode_prompt(self._tokenizer, text) for text in listed]
            except UserError as error:
                raise error.renamed(name) from error
            requests += [
                Request(prompt, nothing_new, pooling=body.pooling, **more) for prompt in prompts
            ]
        return requests
