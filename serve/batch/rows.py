"""The rows of a batch: what a file asks for, and what is written for it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from serve.batch.source import Source
from serve.completion import Completion
from serve.prompts import SETTINGS, RequestBuilder
from serve.request import Request
from stu.common.errors import show
from stu.common.text import Json, nearest, require_unicode

FIELDS = ["prompt", "id", *SETTINGS]


@dataclass(frozen=True)
class Row:
    """A row that can be decoded."""

    number: int
    """Its place in the input, from 0."""
    id: str | int
    given: Mapping[str, Any]
    """Its fields, as they were read."""
    requests: Sequence[Request]
    """One for each completion that is asked for."""


@dataclass(frozen=True)
class Refusal:
    """A row that cannot be decoded."""

    number: int
    id: str | int | None
    error: str
    """Place, field, value, what is allowed, and what to do."""
    status_code: int = 400
    """Of HTTP: 400 if the row is at fault, 500 if the model is."""
    code: str | None = None
    """OpenAI's, where it has one for this error."""


class RowFormat(Protocol):
    """How rows look in the input and in the output."""

    name: str
    id_field: str
    """Names the rows, each with another string or number."""

    def id_of(self, given: Mapping[str, Any], number: int) -> str | int:
        """A row's id. Raises ValueError if it has none that is allowed."""

    def row(self, number: int, row_id: str | int, given: Mapping[str, Any]) -> Row:
        """A row with its requests. Raises ValueError if they cannot be decoded."""

    def completed(self, row: Row, completions: Sequence[Completion]) -> Json:
        """The output row, one completion for each of the row's requests."""

    def refused(self, refusal: Refusal) -> Json:
        """The output row of a row that could not be decoded."""

    def recognise(self, written: Json) -> tuple[int, bool]:
        """Number of an output row, and whether it was refused. Raises KeyError, TypeError or
        ValueError if it is none of this format."""


class PromptRows:
    """`{"prompt": text or token ids, "id": string or whole number, ...settings}`; all but the
    prompt may be missing, and the id is then the row's number."""

    name = "prompts"
    id_field = "id"

    def __init__(self, builder: RequestBuilder) -> None:
        self._builder = builder

    def id_of(self, given: Mapping[str, Any], number: int) -> str | int:
        """`RowFormat.id_of`."""
        row_id = given.get("id", number)
        if isinstance(row_id, bool) or not isinstance(row_id, str | int):
            raise ValueError(
                f"id={show(row_id)} is not allowed: it must be a string or whole number"
            )
        require_unicode("id", row_id if isinstance(row_id, str) else "")
        return row_id

    def row(self, number: int, row_id: str | int, given: Mapping[str, Any]) -> Row:
        """`RowFormat.row`."""
        for key in given:
            if key not in FIELDS:
                raise ValueError(f"unknown field {show(key)}{nearest(key, FIELDS)}")
        if "prompt" not in given:
            raise ValueError('field "prompt" is missing: give a string, "" to start from nothing')
        settings = {name: given[name] for name in SETTINGS if name in given}
        return Row(number, row_id, given, [self._builder.build(number, given["prompt"], settings)])

    def completed(self, row: Row, completions: Sequence[Completion]) -> Json:
        """`{"id", "row", "prompt", "completion", "num_prompt_tokens", "num_completion_tokens",
        "finish_reason"}`, and "logprobs" if they were asked for.

        The prompt's tokens count BOS, the completion's not the EOS that stopped it."""
        (request,), (completion,) = row.requests, completions
        written = {
            "id": row.id,
            "row": row.number,
            "prompt": row.given["prompt"],
            "completion": completion.text,
            "num_prompt_tokens": len(request.prompt_token_ids),
            "num_completion_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        if completion.logprobs:
            written["logprobs"] = [asdict(its) for its in completion.logprobs]
        return written

    def refused(self, refusal: Refusal) -> Json:
        """`{"id", "row", "error"}`."""
        row_id = refusal.number if refusal.id is None else refusal.id
        return {"id": row_id, "row": refusal.number, "error": refusal.error}

    def recognise(self, written: Json) -> tuple[int, bool]:
        """`RowFormat.recognise`."""
        return int(written["row"]), "error" in written


def read_rows(
    source: Source, row_format: RowFormat, is_wanted: Callable[[int], bool]
) -> Iterator[Row | Refusal]:
    """The rows whose numbers are wanted, in order. The ids of all others are read as well, so that
    a row is refused for an id that is taken whichever rows are wanted."""
    numbers: dict[str | int, int] = {}
    for number, given in source:
        row: Row | Refusal | None = None
        row_id: str | int | None = None
        try:
            if isinstance(given, ValueError):
                raise given
            row_id = row_format.id_of(given, number)
            if row_id in numbers:
                raise ValueError(
                    f"{row_format.id_field}={row_id!r} is taken by {source.place(numbers[row_id])}"
                    f": give another (a row without an id has its number, from 0)"
                )
            numbers[row_id] = number
            if is_wanted(number):
                row = row_format.row(number, row_id, given)
        except ValueError as error:
            if is_wanted(number):
                message, code = f"{source.place(number)}: {error}", getattr(error, "code", None)
                row = Refusal(number, row_id, message, code=code)
        if row is not None:
            yield row
