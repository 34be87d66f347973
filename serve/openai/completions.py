"""OpenAI's text completions: from a body to engine requests, and back to the body of an answer.

`serve.openai.chat` does the same for chats.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel

from serve.completion import Completion
from serve.openai.choices import ChoiceWriter, TextChoiceWriter
from serve.openai.response_format import constraint_of
from serve.openai.schemas import CompletionBody, CompletionSettings, read_body
from serve.prompts import SETTINGS, RequestBuilder, choices
from serve.request import Request
from serve.sampling_params import JsonWhitespace
from stu.common.errors import UserError
from stu.common.text import Json, require_unicode
from stu.tokenizer import Tokenizer

DEFAULTS: Json = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 1.0}
"""OpenAI's defaults of settings."""
MOST_CHOICES = 128
"""Largest `n`."""
MOST_STOPS, MOST_STOP_CHARACTERS = 128, 1000
BATCH_CREATED = 0
"""Time in the answers of a batch: rows are the same whenever a run began."""

AnyBody = TypeVar("AnyBody", bound=CompletionSettings)


class Completions(ABC, Generic[AnyBody]):
    """Base of text and chat completions, which turns bodies into requests, and the completions of
    these into the body of an answer.

    The choices of an answer are `n` completions of the first prompt, then of the next.

    Args:
        model_name: Name in answers to bodies that give none.
        json_whitespace: Setting of `stu-serve`.
        max_choices: Limit of choices of one body. None: only the limits of the fields apply.
    """

    body_type: type[AnyBody]
    id_prefix: ClassVar[str]
    client_names: ClassVar[Mapping[str, str]] = {
        "max_new_tokens": "max_tokens",
        "min_new_tokens": "min_tokens",
        "json_schema": "response_format",
        "regex": "response_format",
    }
    """Names of fields in a body, by their names in an engine's request."""

    def __init__(
        self,
        builder: RequestBuilder,
        tokenizer: Tokenizer,
        model_name: str,
        json_whitespace: JsonWhitespace = "compact",
        max_choices: int | None = None,
    ) -> None:
        self._builder, self._tokenizer, self._model_name = builder, tokenizer, model_name
        self._json_whitespace, self._max_choices = json_whitespace, max_choices

    def read(self, values: Any) -> AnyBody:
        """Return the body of a row of a batch. Raises UserError for the first wrong field."""
        body = read_body(self.body_type, values)
        if body.stream:
            raise UserError("stream", True, "false, as a batch has no streams")
        return body

    def requests(self, number: int, body: AnyBody) -> list[Request]:
        """Return a request for each choice.

        Args:
            number: Decides the seed if the body has none.
            body: What the client sent.

        Raises:
            UserError: A value is not allowed; it has the name that the field has in the body.
        """
        try:
            _check(body)
            return choices(self._requests(number, body))
        except UserError as error:
            raise self.in_client_names(error) from error

    def in_client_names(self, error: UserError) -> UserError:
        """Return an error of an engine's request with the name that the field has in a body."""
        return error.renamed(self.client_names.get(error.field, error.field))

    @abstractmethod
    def writers(self, body: AnyBody, requests: Sequence[Request]) -> Sequence[ChoiceWriter]:
        """Return a writer for each choice."""

    def frame(self, answer_id: str, created: int, body: AnyBody) -> Json:
        """Return an answer without its choices and its usage."""
        return {
            "id": f"{self.id_prefix}-{answer_id}",
            "object": self._object(body),
            "created": created,
            "model": body.model or self._model_name,
        }

    def num_prompt_tokens(self, body: AnyBody, requests: Sequence[Request]) -> int:
        """Return the number of prompt tokens, BOS included; a prompt of several choices counts
        once."""
        return sum(len(request.prompt_token_ids) for request in requests[:: body.n or 1])

    def answer(
        self,
        number: int,
        body: AnyBody,
        requests: Sequence[Request],
        completions: Sequence[Completion],
    ) -> Json:
        """Return the body of the answer to row `number` of a batch."""
        writers = self.writers(body, requests)
        choices = [
            writer.write(completion)
            for writer, completion in zip(writers, completions, strict=True)
        ]
        num_new_tokens = sum(len(completion.token_ids) for completion in completions)
        return {
            **self.frame(str(number), BATCH_CREATED, body),
            "choices": choices,
            "usage": usage(self.num_prompt_tokens(body, requests), num_new_tokens),
        }

    @abstractmethod
    def _requests(self, number: int, body: AnyBody) -> list[Request]:
        """Return a request for each prompt."""

    @abstractmethod
    def _object(self, body: AnyBody) -> str:
        """Return the `object` of an answer."""

    def _build(
        self, number: int, prompts: Sequence[Any], body: AnyBody, own_settings: Json
    ) -> list[Request]:
        """Build a request for each prompt. `own_settings` are those that text and chat completions
        name differently."""
        num_choices = len(prompts) * (body.n or 1)
        if self._max_choices is not None and num_choices > self._max_choices:
            fix = f"a body may ask for {self._max_choices} choices, not {num_choices}: send several"
            raise UserError("n", body.n or 1, fix=fix)
        settings = {name: getattr(body, name, None) for name in SETTINGS}
        settings |= {"n": body.n, "min_new_tokens": body.min_tokens, **own_settings}
        if body.ignore_eos is not None:
            settings["stop_at_eos"] = not body.ignore_eos
        if body.response_format is not None:
            constraint = constraint_of(body.response_format, self._json_whitespace)
            if constraint is not None and body.ignore_eos:
                raise UserError("ignore_eos", True, "false with response_format, as EOS ends it")
            settings["constraint"] = constraint
        given = {name: value for name, value in settings.items() if value is not None}
        return [self._builder.build(number, prompt, given) for prompt in prompts]


class TextCompletions(Completions[CompletionBody]):
    """Bodies of `/v1/completions`."""

    body_type, id_prefix = CompletionBody, "cmpl"

    def writers(self, body: CompletionBody, requests: Sequence[Request]) -> list[TextChoiceWriter]:
        """Return a writer for each choice."""
        prompts = prompts_of(body)
        writers = []
        for index, request in enumerate(requests):
            prompt = prompts[index // (body.n or 1)]
            echo = self._text(prompt) if body.echo else None
            adds_bos = isinstance(prompt, str) or not prompt
            writers.append(TextChoiceWriter(self._tokenizer, request, index, echo, adds_bos))
        return writers

    def _requests(self, number: int, body: CompletionBody) -> list[Request]:
        if body.best_of not in (None, body.n or 1):
            raise UserError("best_of", body.best_of, "left out, or equal to n")
        own = {
            "max_new_tokens": body.max_tokens,
            "logprobs": body.logprobs,
            "prompt_logprobs": body.logprobs if body.echo else None,
        }
        return self._build(number, prompts_of(body), body, own)

    def _object(self, body: CompletionBody) -> str:
        return "text_completion"

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)


def prompts_of(body: CompletionBody) -> list[Any]:
    """Return the prompts of a body, each a text or token ids."""
    prompt = body.prompt
    is_list = isinstance(prompt, list) and any(isinstance(part, str | list) for part in prompt)
    return list(prompt) if is_list else [prompt]


def usage(num_prompt_tokens: int, num_new_tokens: int) -> Json:
    """Return OpenAI's numbers of tokens."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": num_prompt_tokens + num_new_tokens,
    }


def _check(body: CompletionSettings) -> None:
    """Check the values that only a body has; the builder checks the others."""
    if body.stream_options is not None and not body.stream:
        raise UserError("stream_options", fix="it needs stream=true, leave it out")
    if body.n is not None and not 1 <= body.n <= MOST_CHOICES:
        raise UserError("n", body.n, f"a whole number from 1 to {MOST_CHOICES}")
    if body.ignore_eos is not None and body.stop_at_eos is body.ignore_eos:
        raise UserError("ignore_eos", body.ignore_eos, "the opposite of stop_at_eos")
    stops = body.stop if isinstance(body.stop, list) else [body.stop or ""]
    if len(stops) > MOST_STOPS or any(len(stop) > MOST_STOP_CHARACTERS for stop in stops):
        allowed = f"at most {MOST_STOPS} strings of at most {MOST_STOP_CHARACTERS:,} characters"
        raise UserError("stop", body.stop, allowed)
    _require_unicode(body)


def _require_unicode(body: CompletionSettings) -> None:
    """Raise UserError for a string that UTF-8 cannot hold."""
    for name, value in body:
        values = [] if name == "prompt" else [value]  # the builder checks prompts
        while values:
            value = values.pop()
            if isinstance(value, str):
                require_unicode(name, value)
            elif isinstance(value, list):
                values += value
            elif isinstance(value, dict):
                values += [*value, *value.values()]
            elif isinstance(value, BaseModel):
                values += [part for _, part in value]
