"""Rows of OpenAI's batch format."""

from collections.abc import Mapping, Sequence
from typing import Any

from serve.batch.rows import Refusal, Row
from serve.completion import Completion
from serve.openai.endpoint import Endpoint
from serve.openai.errors import error_body
from stu.common.errors import UserError, show
from stu.common.text import Json, nearest, require_unicode

FIELDS = ["custom_id", "method", "url", "body"]
ID_PREFIX = "batch_req_"


class OpenAiRows:
    """Rows of `{"custom_id", "method": "POST", "url": "/v1/completions", "body": {...}}`, or with
    another url; a file may have all kinds.

    endpoints: Endpoints by url, which read the bodies.
    """

    name = "openai"
    id_field = "custom_id"

    def __init__(self, endpoints: Mapping[str, Endpoint[Any]]) -> None:
        self._endpoints = endpoints

    def id_of(self, fields: Mapping[str, Any], number: int) -> str:
        """See `RowFormat.id_of`."""
        if "custom_id" not in fields:
            message = 'field "custom_id" is missing: give a string that no other row has'
            raise UserError("custom_id", message=message)
        row_id = fields["custom_id"]
        if not isinstance(row_id, str):
            raise UserError("custom_id", row_id, "a string")
        require_unicode("custom_id", row_id)
        return row_id

    def row(self, number: int, row_id: str | int, fields: Mapping[str, Any]) -> Row:
        """See `RowFormat.row`."""
        for key in fields:
            if key not in FIELDS:
                raise UserError(key, message=f"unknown field {show(key)}{nearest(key, FIELDS)}")
        method, url, body = fields.get("method"), fields.get("url"), fields.get("body")
        if method != "POST":
            raise UserError("method", method, '"POST"')
        if not isinstance(url, str) or url not in self._endpoints:
            raise UserError("url", url, " or ".join(f'"{known}"' for known in self._endpoints))
        if not isinstance(body, dict):
            raise UserError("body", body, "a JSON object")
        read = self._endpoints[url].read(body)
        requests = self._endpoints[url].requests(number, read)
        return Row(number, row_id, {"url": url, "body": read}, requests)

    def completed(self, row: Row, completions: Sequence[Completion]) -> Json:
        """Return `{"id", "custom_id", "response": {"status_code", "request_id", "body"},
        "error": null}` with OpenAI's body."""
        endpoint = self._endpoints[row.fields["url"]]
        body = endpoint.answer(row.number, row.fields["body"], row.requests, completions)
        return _written(row.number, row.id, 200, body, None)

    def refused(self, refusal: Refusal) -> Json:
        """Return a row like `completed`, with OpenAI's error as the body and in `error`."""
        message = refusal.error
        kind = "invalid_request_error" if refusal.status_code < 500 else "server_error"
        body = error_body(message, kind, code=refusal.code)
        error = {"code": refusal.code or kind, "message": message}
        return _written(refusal.number, refusal.id, refusal.status_code, body, error)

    def recognise(self, written: Json) -> tuple[int, bool]:
        """See `RowFormat.recognise`."""
        written_id = str(written["id"])
        if not written_id.startswith(ID_PREFIX):
            raise ValueError(f"id={show(written_id)} does not begin with {ID_PREFIX}")
        return int(written_id.removeprefix(ID_PREFIX)), written["error"] is not None


def _written(
    number: int, row_id: str | int | None, status_code: int, body: Json, error: Json | None
) -> Json:
    return {
        "id": f"{ID_PREFIX}{number}",
        "custom_id": row_id,
        "response": {"status_code": status_code, "request_id": f"req_{number}", "body": body},
        "error": error,
    }
