"""Endpoints of OpenAI's API: from a body to engine requests, and back to the body of an answer."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic

from pydantic import BaseModel

from serve.completion import Completion
from serve.openai.choices import ChoiceWriter
from serve.openai.schemas import AnyBody, EngineBody, RequestBody, read_body
from serve.request import MOST_PRIORITY, Request
from stu.common.errors import UserError
from stu.common.text import Json, require_unicode
from stu.tokenizer import Tokenizer

MOST_DEPTH = 200
"""Limit of lists and objects within one another in a body: no schema of more can be followed."""
BATCH_CREATED = 0
"""Time in the answers of a batch: rows are the same whenever a run began."""


class Endpoint(ABC, Generic[AnyBody]):
    """Base of completions and embeddings, which turns bodies into requests, and the results of
    these into the body of an answer.

    Args:
        tokenizer: The model's tokenizer.
        model_name: Name in answers to bodies that give none.
        max_seq_len: Longest context in tokens.
        max_choices: Limit of requests of one body. None: only the limits of the fields apply.
    """

    body_type: type[AnyBody]
    list_name: ClassVar[str]
    """Field of an answer with a result for each request."""
    operation: ClassVar[str]
    """Name of the operation by OpenTelemetry's conventions."""
    client_names: ClassVar[Mapping[str, str]]
    """Names of fields in a body, by their names in an engine's request."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        model_name: str,
        max_seq_len: int,
        max_choices: int | None = None,
    ) -> None:
        self._tokenizer, self._model_name = tokenizer, model_name
        self._max_seq_len, self._max_choices = max_seq_len, max_choices

    def read(self, values: Any) -> AnyBody:
        """Return the body of a row of a batch. Raises UserError for the first wrong field."""
        return read_body(self.body_type, values)

    def requests(self, number: int, body: AnyBody) -> list[Request]:
        """Return the requests of a body, in the order of their results.

        Args:
            number: Decides the seed if the body has none.
            body: What the client sent.

        Raises:
            UserError: A value is not allowed; it has the name that the field has in the body.
        """
        try:
            _check_values(body)
            return self._requests(number, body)
        except UserError as error:
            raise self.in_client_names(error, body) from error

    def in_client_names(self, error: UserError, body: AnyBody) -> UserError:
        """Return an error of an engine's request with the name that the field has in a body."""
        return error.renamed(self.client_names.get(error.field, error.field))

    def about_prompt(self, error: UserError, body: AnyBody, index: int) -> UserError:
        """Return an error of the request of a prompt with the name that the field has in a body."""
        return self.in_client_names(error, body)

    def constraint_field(self, body: AnyBody, kind: str) -> str:
        """Return the name of the field of a body that asks for a constraint of a kind."""
        return self.in_client_names(UserError(kind), body).field

    @abstractmethod
    def writers(self, body: AnyBody, requests: Sequence[Request]) -> Sequence[ChoiceWriter]:
        """Return a writer for each result."""

    @abstractmethod
    def frame(self, answer_id: str, created: int, body: AnyBody) -> Json:
        """Return an answer without its results and its usage."""

    def results(
        self, body: AnyBody, writers: Sequence[ChoiceWriter], completions: Iterable[Completion]
    ) -> Iterator[Json]:
        """Yield the results of a whole answer, given what was generated for each request. Nothing
        is kept that has been yielded, as completions with log probabilities are large."""
        for writer, completion in zip(writers, completions, strict=True):
            yield writer.write(completion)

    def last_fields(self, body: AnyBody, writers: Sequence[ChoiceWriter]) -> Json:
        """Return further fields of a whole answer, once its results are written."""
        return {}

    def choices_per_prompt(self, body: AnyBody) -> int:
        """Return the number of requests of each prompt, which follow one another."""
        return 1

    def num_prompt_tokens(self, body: AnyBody, requests: Sequence[Request]) -> int:
        """Return the number of prompt tokens, BOS included; a prompt of several choices counts
        once."""
        first = requests[:: self.choices_per_prompt(body)]
        return sum(len(request.prompt_token_ids) for request in first)

    def answer(
        self,
        number: int,
        body: AnyBody,
        requests: Sequence[Request],
        completions: Sequence[Completion],
    ) -> Json:
        """Return the body of the answer to row `number` of a batch."""
        writers = self.writers(body, requests)
        results = list(self.results(body, writers, completions))
        num_new_tokens = sum(len(completion.token_ids) for completion in completions)
        return {
            **self.frame(str(number), BATCH_CREATED, body),
            self.list_name: results,
            "usage": usage(self.num_prompt_tokens(body, requests), num_new_tokens),
            **self.last_fields(body, writers),
        }

    def _truncation(self, body: EngineBody, max_new_tokens: int) -> int | None:
        """Return how many tokens of its prompts a body asks to use, None for all. With -1 there is
        room for `max_new_tokens` after them."""
        count = body.truncate_prompt_tokens
        return max(1, self._max_seq_len - max_new_tokens) if count == -1 else count

    @abstractmethod
    def _requests(self, number: int, body: AnyBody) -> list[Request]:
        """Return the requests of a body."""


def request_fields(body: EngineBody) -> dict[str, Any]:
    """Return fields of an engine's request that a body of any kind may have, if it does.

    Raises UserError for a negative priority, as its requests would overtake all that name none.
    """
    priority = body.priority or 0
    if not 0 <= priority <= MOST_PRIORITY:
        allowed = f"a whole number from 0, which goes first and is the default, to {MOST_PRIORITY}"
        raise UserError("priority", priority, allowed)
    values = {"cache_salt": body.cache_salt, "priority": priority}
    return {name: value for name, value in values.items() if value}


def usage(num_prompt_tokens: int, num_new_tokens: int) -> Json:
    """Return OpenAI's numbers of tokens."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": num_prompt_tokens + num_new_tokens,
    }


def _check_values(body: RequestBody) -> None:
    """Raise UserError for a string that UTF-8 cannot hold, a number that JSON cannot, and deeply
    nested values."""
    for name, value in body:
        depth = 0
        # Prompts and inputs are checked as they are encoded.
        values = [] if name in ("prompt", "input") else [value]
        while values:
            if depth > MOST_DEPTH:
                raise UserError(name, fix=f"it is nested more than {MOST_DEPTH} levels deep")
            depth += 1
            inner: list[Any] = []
            for value in values:
                if isinstance(value, str):
                    require_unicode(name, value)
                elif isinstance(value, float) and not math.isfinite(value):
                    raise UserError(name, fix="it has a number that is not finite, or is too large")
                elif isinstance(value, list):
                    inner += value
                elif isinstance(value, dict):
                    inner += [*value, *value.values()]
                elif isinstance(value, BaseModel):
                    inner += [part for _, part in value]
            values = inner
