"""OpenAI's chat completions in a batch: the server's, in place of its streams a whole answer."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from serve.completion import Completion
from serve.openai.body_errors import body_error
from serve.openai.chat import ChatTemplate
from serve.openai.chat_body import text_body
from serve.openai.chat_choices import ChatChoiceWriter
from serve.openai.completions import Completions
from serve.openai.schemas import ChatBody
from serve.request import Request
from stu.common.text import Json, require_unicode
from stu.tokenizer import Tokenizer


class BatchChats:
    """Reads and writes bodies of chat completions, with the methods of `Completions`.

    default_new_tokens: for a chat without a limit of its own, if there is room.
    """

    def __init__(
        self,
        completions: Completions,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        max_seq_len: int,
        default_new_tokens: int,
    ) -> None:
        self._completions, self._template, self._tokenizer = completions, template, tokenizer
        self._max_seq_len, self._default_new_tokens = max_seq_len, default_new_tokens

    def requests(self, number: int, body: Mapping[str, Any]) -> list[Request]:
        """`Completions.requests`."""
        try:
            checked = ChatBody.model_validate(body)
        except ValidationError as error:
            found = error.errors(include_url=False)
            if not found[0]["loc"]:  # of a field that is known, and not done
                raise ValueError(
                    str(found[0].get("ctx", {}).get("error", found[0]["msg"]))
                ) from error
            raise ValueError(body_error(found)[0]) from error
        for name, value in checked.model_dump(exclude_none=True).items():
            require_unicode(name, json.dumps(value, ensure_ascii=False))
        given = text_body(checked, self._template, self._max_seq_len, self._default_new_tokens)
        return self._completions.requests(number, given)

    def answer(
        self,
        number: int,
        body: Mapping[str, Any],
        requests: Sequence[Request],
        completions: Sequence[Completion],
    ) -> Json:
        """`Completions.answer`."""
        writers = [
            ChatChoiceWriter(self._tokenizer, request, index, is_stream=False)
            for index, request in enumerate(requests)
        ]
        choices = [
            writer.write(completion)
            for writer, completion in zip(writers, completions, strict=True)
        ]
        frame = self._completions.frame(number, body, requests, completions)
        return {
            **frame,
            "id": f"chatcmpl-{number}",
            "object": "chat.completion",
            "choices": choices,
        }
