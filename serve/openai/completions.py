"""OpenAI's text completions: from a body to engine requests, and back to the body of an answer.

`serve.openai.chat` does the same for chats.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar, TypeVar

from serve.completion import Completion, best
from serve.openai.choices import ChoiceWriter, TextChoiceWriter
from serve.openai.endpoint import Endpoint, request_fields
from serve.openai.schemas import CompletionBody, CompletionSettings
from serve.openai.structured_outputs import constraint_field, structured_constraint
from serve.prompts import SETTINGS, RequestBuilder, choices, listed_prompts
from serve.request import Request
from serve.sampling_params import MOST_LOGPROBS, Constraint, JsonWhitespace
from stu.common.errors import UserError
from stu.common.text import Json

DEFAULTS: Json = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 1.0}
"""OpenAI's defaults of settings."""
MOST_CHOICES = 128
"""Largest `n`."""
MOST_STOPS, MOST_STOP_CHARACTERS = 128, 1000

AnyBody = TypeVar("AnyBody", bound=CompletionSettings)


class Completions(Endpoint[AnyBody]):
    """Base of text and chat completions.

    The choices of an answer are `n` completions of the first prompt, then of the next.

    Args:
        json_whitespace: Setting of `stu-serve`.
        settings: Arguments of `Endpoint`.
    """

    id_prefix: ClassVar[str]
    list_name = "choices"
    client_names: ClassVar[Mapping[str, str]] = {
        "max_new_tokens": "max_tokens",
        "min_new_tokens": "min_tokens",
        **dict.fromkeys(("json_schema", "regex", "choice", "grammar"), "response_format"),
        "tools": "tools",
    }

    def __init__(
        self, builder: RequestBuilder, json_whitespace: JsonWhitespace = "compact", **settings: Any
    ) -> None:
        super().__init__(**settings)
        self._builder, self._json_whitespace = builder, json_whitespace

    def read(self, values: Any) -> AnyBody:
        """See `Endpoint.read`."""
        body = super().read(values)
        if body.stream:
            raise UserError("stream", True, "false, as a batch has no streams")
        return body

    def frame(self, answer_id: str, created: int, body: AnyBody) -> Json:
        """Return an answer without its choices and its usage."""
        return {
            "id": f"{self.id_prefix}-{answer_id}",
            "object": self._object(body),
            "created": created,
            "model": body.model or self._model_name,
        }

    def constraint_field(self, body: AnyBody, kind: str) -> str:
        """See `Endpoint.constraint_field`."""
        return kind if kind == "tools" else constraint_field(body)

    def choices_per_prompt(self, body: AnyBody) -> int:
        """See `Endpoint.choices_per_prompt`."""
        return body.best_of or body.n or 1

    def results(
        self, body: AnyBody, writers: Sequence[ChoiceWriter], completions: Iterable[Completion]
    ) -> Iterator[Json]:
        """See `Endpoint.results`."""
        n, num_candidates = body.n or 1, self.choices_per_prompt(body)
        if num_candidates > n:
            completions = _best_of(completions, num_candidates, n)
        return super().results(body, writers, completions)

    def _requests(self, number: int, body: AnyBody) -> list[Request]:
        _check(body)
        return choices(self._prompt_requests(number, body))

    @abstractmethod
    def _prompt_requests(self, number: int, body: AnyBody) -> list[Request]:
        """Return a request for each prompt."""

    def _constraint(self, body: AnyBody) -> Constraint | None:
        """Return what the text of an answer must match."""
        return structured_constraint(body, self._json_whitespace)

    @abstractmethod
    def _num_logprobs(self, body: AnyBody) -> int | None:
        """Return the number of most probable tokens to report, None for no log probabilities."""

    @abstractmethod
    def _object(self, body: AnyBody) -> str:
        """Return the `object` of an answer."""

    def _answered(self, body: AnyBody, requests: Sequence[Request]) -> Sequence[Request]:
        """Return a request for each choice of the answer, with the log probabilities that the body
        asks for: those that choose the best are not shown."""
        n, num_candidates = body.n or 1, self.choices_per_prompt(body)
        if num_candidates == n:
            return requests
        count = self._num_logprobs(body)
        return [
            replace(request, sampling=replace(request.sampling, logprobs=count))
            for first in range(0, len(requests), num_candidates)
            for request in requests[first : first + n]
        ]

    def _build(
        self, number: int, prompts: Sequence[Any], body: AnyBody, own_settings: Json
    ) -> list[Request]:
        """Build a request for each prompt. `own_settings` are those that text and chat completions
        name differently."""
        num_choices = len(prompts) * self.choices_per_prompt(body)
        if self._max_choices is not None and num_choices > self._max_choices:
            fix = f"a body may ask for {self._max_choices} choices, not {num_choices}: send several"
            name, value = ("best_of", body.best_of) if body.best_of else ("n", body.n or 1)
            raise UserError(name, value, fix=fix)
        settings = {name: getattr(body, name, None) for name in SETTINGS}
        settings |= {"n": body.n, "min_new_tokens": body.min_tokens, **own_settings}
        if body.ignore_eos is not None:
            settings["stop_at_eos"] = not body.ignore_eos
        if (constraint := self._constraint(body)) is not None:
            if body.ignore_eos:
                field = self.constraint_field(body, constraint.kind)
                raise UserError("ignore_eos", True, f"false with {field}, as EOS ends it")
            settings["constraint"] = constraint
        given = {name: value for name, value in settings.items() if value is not None}
        more = request_fields(body)
        requests = [self._builder.build(number, prompt, given) for prompt in prompts]
        return [replace(request, **more) for request in requests] if more else requests


class TextCompletions(Completions[CompletionBody]):
    """Bodies of `/v1/completions`."""

    body_type, id_prefix = CompletionBody, "cmpl"
    operation = "text_completion"

    def writers(self, body: CompletionBody, requests: Sequence[Request]) -> list[TextChoiceWriter]:
        """Return a writer for each choice."""
        prompts = listed_prompts(body.prompt)
        writers = []
        for index, request in enumerate(self._answered(body, requests)):
            prompt = prompts[index // (body.n or 1)]
            start_ids, tokens = self._tokenizer.start_ids, request.prompt_token_ids
            adds_bos = bool(start_ids) and (isinstance(prompt, str) or not prompt)
            if body.truncate_prompt_tokens is not None:
                adds_bos = adds_bos and list(tokens[:1]) == start_ids
                prompt = list(tokens)
            echo = self._text(prompt) if body.echo else None
            writers.append(
                TextChoiceWriter(
                    self._tokenizer, request, index, echo, adds_bos, body.prompt_logprobs
                )
            )
        return writers

    def _prompt_requests(self, number: int, body: CompletionBody) -> list[Request]:
        limit = body.max_tokens
        if limit is None:
            limit = self._builder.defaults.max_new_tokens
        asked = (body.prompt_logprobs, body.logprobs if body.echo else None)
        own = {
            "max_new_tokens": body.max_tokens,
            "truncate_prompt_tokens": self._truncation(body, limit),
            "logprobs": body.logprobs,
            "prompt_logprobs": max((count for count in asked if count is not None), default=None),
        }
        return self._build(number, listed_prompts(body.prompt), body, own)

    def _num_logprobs(self, body: CompletionBody) -> int | None:
        return body.logprobs

    def _object(self, body: CompletionBody) -> str:
        return "text_completion"

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)


def _best_of(
    completions: Iterable[Completion], num_candidates: int, n: int
) -> Iterator[Completion]:
    """Yield the best `n` of each `num_candidates` completions."""
    left = iter(completions)
    while candidates := list(islice(left, num_candidates)):
        yield from best(candidates, n)


def _check(body: CompletionSettings) -> None:
    """Check the values that only a body has; the builder checks the others."""
    if body.stream_options is not None and not body.stream:
        raise UserError("stream_options", fix="it needs stream=true, leave it out")
    if body.n is not None and not 1 <= body.n <= MOST_CHOICES:
        raise UserError("n", body.n, f"a whole number from 1 to {MOST_CHOICES}")
    if body.best_of is not None:
        n = body.n or 1
        if not n <= body.best_of <= MOST_CHOICES:
            allowed = f"a whole number from n, which is {n}, to {MOST_CHOICES}"
            raise UserError("best_of", body.best_of, allowed)
        if body.stream and body.best_of > n:
            allowed = f"{n}, as n, with stream=true: which are the best is known only at the end"
            raise UserError("best_of", body.best_of, allowed)
    if body.prompt_logprobs is not None:
        if not 0 <= body.prompt_logprobs <= MOST_LOGPROBS:
            allowed = f"from 0 to {MOST_LOGPROBS}, or null for none"
            raise UserError("prompt_logprobs", body.prompt_logprobs, allowed)
        if body.stream:
            fix = "it needs stream=false; echo and logprobs of /v1/completions are streamed"
            raise UserError("prompt_logprobs", body.prompt_logprobs, fix=fix)
    if body.ignore_eos is not None and body.stop_at_eos is body.ignore_eos:
        raise UserError("ignore_eos", body.ignore_eos, "the opposite of stop_at_eos")
    stops = body.stop if isinstance(body.stop, list) else [body.stop or ""]
    if len(stops) > MOST_STOPS or any(len(stop) > MOST_STOP_CHARACTERS for stop in stops):
        allowed = f"at most {MOST_STOPS} strings of at most {MOST_STOP_CHARACTERS:,} characters"
        raise UserError("stop", body.stop, allowed)
