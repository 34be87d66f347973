"""OpenAI's chat completions: a chat template writes the prompt, and tools may be called."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from serve.openai.choices import ChatChoiceWriter
from serve.openai.completions import Completions
from serve.openai.messages import rendered
from serve.openai.schemas import ChatBody
from serve.openai.tools.choice import ToolUse, tool_use
from serve.openai.tools.reader import call_reader
from serve.openai.tools.rendering import ToolPrompts
from serve.request import Request
from serve.sampling.tool_grammar import tool_constraint
from serve.sampling_params import Constraint
from stu.chat.template import ChatTemplate
from stu.common.errors import UserError


class ChatCompletions(Completions[ChatBody]):
    """Bodies of `/v1/chat/completions`.

    Args:
        max_seq_len: Longest context in tokens.
        default_new_tokens: Limit of new tokens for a body without one; it gets less if there is
            less room in the context.
        settings: Arguments of `Completions`.
    """

    body_type, id_prefix = ChatBody, "chatcmpl"
    operation = "chat"
    client_names: ClassVar[Mapping[str, str]] = {
        **Completions.client_names,
        "prompt": "messages",
        "logprobs": "top_logprobs",
    }

    def __init__(
        self, template: ChatTemplate, max_seq_len: int, default_new_tokens: int, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self._prompts, self._max_seq_len = ToolPrompts(template), max_seq_len
        self._default_new_tokens = default_new_tokens

    def writers(self, body: ChatBody, requests: Sequence[Request]) -> list[ChatChoiceWriter]:
        """Return a writer for each choice."""
        readers = [call_reader(request) for request in requests]
        return [
            ChatChoiceWriter(self._tokenizer, request, index, bool(body.stream), readers[index])
            for index, request in enumerate(requests)
        ]

    def _prompt_requests(self, number: int, body: ChatBody) -> list[Request]:
        use = _tool_use(body)
        prompt = self._prompts.tokens(
            rendered(body.messages),
            body.chat_template_kwargs or {},
            None if use is None else use.described,
        )
        if body.top_logprobs and not body.logprobs:
            raise UserError("top_logprobs", body.top_logprobs, "used with logprobs=true")
        own = {
            "max_new_tokens": self._max_new_tokens(body, len(prompt)),
            "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        }
        return self._build(number, [prompt], body, own)

    def _constraint(self, body: ChatBody) -> Constraint | None:
        text, use = super()._constraint(body), _tool_use(body)
        if use is None:
            return text
        if text is not None and text.kind == "regex":
            raise UserError("response_format", "regex", "a JSON schema with tools")
        schema = None if text is None else json.loads(text.source)
        return tool_constraint(replace(use.answers, text=schema))

    def _max_new_tokens(self, body: ChatBody, num_prompt_tokens: int) -> int:
        limits = {body.max_tokens, body.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise UserError(
                "max_tokens", body.max_tokens, "left out, or equal to max_completion_tokens"
            )
        room = max(1, self._max_seq_len - num_prompt_tokens)
        return limits.pop() or 0 if limits else min(self._default_new_tokens, room)

    def _object(self, body: ChatBody) -> str:
        return "chat.completion.chunk" if body.stream else "chat.completion"


def _tool_use(body: ChatBody) -> ToolUse | None:
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    return tool_use(tools, body.tool_choice, body.parallel_tool_calls)
