"""Rows of a batch: input rows, and the output rows written for them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from serve.batch.source import Source
from serve.completion import Completion, answered
from serve.prompts import SETTINGS, RequestBuilder, choices
from serve.request import Request
from serve.sampling_params import SamplingParams
from stu.common.errors import UserError, show
from stu.common.text import Json, nearest, require_unicode


@dataclass(frozen=True)
class Row:
    """A row that can be decoded."""

    number: int
    """Number in the input, from 0."""
    id: str | int
    fields: Mapping[str, Any]
    """Fields of the input row."""
    requests: Sequence[Request]
    """A request for each completion."""
    sampling: SamplingParams | None = None
    """Settings of the row, where it has one prompt."""


@dataclass(frozen=True)
class Refusal:
    """A row that cannot be decoded."""

    number: int
    id: str | int | None
    error: str
    """Message with place, field, value, what is allowed, and what to do."""
    status_code: int = 400
    """HTTP status: 400 if the row is at fault, 500 if the model is."""
    code: str | None = None
    """OpenAI's error code, where there is one."""


class RowFormat(Protocol):
    """A format of input and output rows."""

    name: str
    id_field: str
    """Name of the field that identifies a row."""

    def id_of(self, fields: Mapping[str, Any], number: int) -> str | int:
        """Return the id of row `number`. Raises UserError if it is not allowed."""

    def row(self, number: int, row_id: str | int, fields: Mapping[str, Any]) -> Row:
        """Return a row with its requests. Raises UserError if they cannot be decoded."""

    def completed(self, row: Row, completions: Sequence[Completion]) -> Json:
        """Return the output row, given a completion for each request of `row`."""

    def refused(self, refusal: Refusal) -> Json:
        """Return the output row of a row that cannot be decoded."""

    def recognise(self, written: Json) -> tuple[int, bool]:
        """Return the number of an output row and whether it has an error. Raises KeyError,
        TypeError or ValueError if it is not of this format."""


class PromptRows:
    """Rows of `{"prompt": text or token ids, "id": string or whole number, ...settings}`. Only the
    prompt is required; the default id is the row's number."""

    name = "prompts"
    id_field = "id"
    fields: Sequence[str] = ("prompt", "id", *SETTINGS)
    """Names of the fields that a row may have."""

    def __init__(self, builder: RequestBuilder) -> None:
        self._builder = builder

    def id_of(self, fields: Mapping[str, Any], number: int) -> str | int:
        """See `RowFormat.id_of`."""
        row_id = fields.get("id", number)
        if isinstance(row_id, bool) or not isinstance(row_id, str | int):
            raise UserError("id", row_id, "a string or whole number")
        require_unicode("id", row_id if isinstance(row_id, str) else "")
        return row_id

    def row(self, number: int, row_id: str | int, fields: Mapping[str, Any]) -> Row:
        """See `RowFormat.row`."""
        self.check_fields(fields)
        settings = {name: fields[name] for name in SETTINGS if name in fields}
        request = self._builder.build(number, fields["prompt"], settings)
        return Row(number, row_id, fields, choices([request]), request.sampling)

    def check_fields(self, fields: Mapping[str, Any]) -> None:
        """Raise UserError if there is an unknown field, or no prompt."""
        for key in fields:
            if key not in self.fields:
                message = f"unknown field {show(key)}{nearest(key, self.fields)}"
                raise UserError(key, message=message)
        if "prompt" not in fields:
            message = 'field "prompt" is missing: give a string, which may be empty'
            raise UserError("prompt", message=message)

    def completed(self, row: Row, completions: Sequence[Completion]) -> Json:
        """Return `{"id", "row", "prompt", "completion", "num_prompt_tokens",
        "num_completion_tokens", "finish_reason"}`, and "logprobs" and "prompt_logprobs" if the
        row asks for them.

        BOS counts as a prompt token; a stop token is not counted."""
        assert row.sampling is not None
        request, (completion,) = row.requests[0], answered(completions, row.sampling)
        written = {
            "id": row.id,
            "row": row.number,
            "prompt": row.fields["prompt"],
            "completion": completion.text,
            "num_prompt_tokens": len(request.prompt_token_ids),
            "num_completion_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(row.sampling, name) is not None:
                written[name] = [asdict(values) for values in getattr(completion, name)]
        return written

    def refused(self, refusal: Refusal) -> Json:
        """Return `{"id", "row", "error"}`."""
        row_id = refusal.number if refusal.id is None else refusal.id
        return {"id": row_id, "row": refusal.number, "error": refusal.error}

    def recognise(self, written: Json) -> tuple[int, bool]:
        """See `RowFormat.recognise`."""
        return int(written["row"]), "error" in written


def read_rows(
    source: Source, row_format: RowFormat, is_wanted: Callable[[int], bool]
) -> Iterator[Row | Refusal]:
    """Yield the rows whose numbers are wanted, in order.

    The ids of all rows are read, so that a row whose id is taken is refused whichever rows are
    wanted."""
    numbers: dict[str | int, int] = {}
    for number, fields in source:
        row: Row | Refusal | None = None
        row_id: str | int | None = None
        try:
            if isinstance(fields, UserError):
                raise fields
            row_id = row_format.id_of(fields, number)
            if row_id in numbers:
                raise UserError(
                    row_format.id_field,
                    row_id,
                    fix=f"{source.place(numbers[row_id])} has it already; give another (a row "
                    "without an id takes its number, from 0)",
                )
            numbers[row_id] = number
            if is_wanted(number):
                row = row_format.row(number, row_id, fields)
        except UserError as error:
            if is_wanted(number):
                row = Refusal(number, row_id, f"{source.place(number)}: {error}", code=error.code)
        if row is not None:
            yield row
