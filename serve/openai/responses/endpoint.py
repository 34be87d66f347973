"""OpenAI's responses: from a body to a request of a chat, and to the response."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from serve.completion import Completion
from serve.openai.chat import ChatCompletions
from serve.openai.choices import ChoiceWriter
from serve.openai.completions import DEFAULTS
from serve.openai.endpoint import Endpoint, usage
from serve.openai.responses.body import ResponseBody, chat_of
from serve.openai.responses.writer import ResponseWriter
from serve.request import Request
from stu.common.errors import UserError
from stu.common.text import Json


class Responses(Endpoint[ResponseBody]):
    """Bodies of `/v1/responses`.

    Args:
        chats: Chats of the same model.
        settings: Arguments of `Endpoint`.
    """

    body_type, list_name, operation = ResponseBody, "output", "chat"
    client_names: ClassVar[Mapping[str, str]] = {
        "messages": "input",
        "response_format": "text.format",
        "max_completion_tokens": "max_output_tokens",
        "max_tokens": "max_output_tokens",
    }

    def __init__(self, chats: ChatCompletions, **settings: Any) -> None:
        super().__init__(**settings)
        self._chats = chats

    def read(self, values: Any) -> ResponseBody:
        """See `Endpoint.read`."""
        body = super().read(values)
        if body.stream:
            raise UserError("stream", True, "false, as a batch has no streams")
        if body.previous_response_id is not None:
            fix = "a batch finds no earlier responses: give their items in input"
            raise UserError("previous_response_id", body.previous_response_id, fix=fix)
        return body

    def in_client_names(self, error: UserError, body: ResponseBody) -> UserError:
        """See `Endpoint.in_client_names`."""
        error = error.renamed(self._chats.client_names.get(error.field, error.field))
        # A response has what is in json_schema beside the type.
        place = error.field.replace("response_format.json_schema", "response_format")
        field, _, inner = place.partition(".")
        if field == "messages":  # their numbers are not those of items
            return error.renamed("input")
        if field == "tools":
            return error.renamed(error.field.replace(".function", ""))
        named = super().in_client_names(error.renamed(field), body)
        return named.renamed(f"{named.field}.{inner}") if inner else named

    def writers(self, body: ResponseBody, requests: Sequence[Request]) -> list[ChoiceWriter]:
        """Return nothing: see `writer`."""
        return []

    def writer(
        self, answer_id: str, created: int, body: ResponseBody, request: Request
    ) -> ResponseWriter:
        """Return the writer of a response."""
        return ResponseWriter(self._tokenizer, request, self.frame(answer_id, created, body))

    def frame(self, answer_id: str, created: int, body: ResponseBody) -> Json:
        """Return a response without its output, its usage and its status."""
        text: Json = body.text.model_dump(exclude_none=True) if body.text else {}
        return {
            "id": f"resp_{answer_id}",
            "object": "response",
            "created_at": created,
            "completed_at": None,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model or self._model_name,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": DEFAULTS["temperature"]
            if body.temperature is None
            else body.temperature,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": DEFAULTS["top_p"] if body.top_p is None else body.top_p,
            "truncation": "disabled",
        }

    def answer(
        self,
        number: int,
        body: ResponseBody,
        requests: Sequence[Request],
        completions: Sequence[Completion],
    ) -> Json:
        """See `Endpoint.answer`."""
        (request,), (completion,) = requests, completions
        unstored = body.model_copy(update={"store": False})
        writer = self.writer(str(number), 0, unstored, request)
        writer.write(completion)
        counts = usage(len(request.prompt_token_ids), len(completion.token_ids))
        writer.end(counts, completion.finish_reason == "length", 0)
        return writer.response

    def _requests(self, number: int, body: ResponseBody) -> list[Request]:
        return self._chats.requests(number, chat_of(body))
