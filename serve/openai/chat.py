"""OpenAI's chat completions: a chat template writes the prompt, and tools may be called."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from serve.openai.choices import ChatChoiceWriter, prompt_logprobs
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
from stu.common.text import Json


class ChatCompletions(Completions[ChatBody]):
    """Bodies of `/v1/chat/completions`.

    Args:
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

    def __init__(self, template: ChatTemplate, default_new_tokens: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._prompts, self._default_new_tokens = ToolPrompts(template), default_new_tokens

    def writers(self, body: ChatBody, requests: Sequence[Request]) -> list[ChatChoiceWriter]:
        """Return a writer for each choice."""
        return [
            ChatChoiceWriter(
                self._tokenizer, request, index, bool(body.stream), call_reader(request)
            )
            for index, request in enumerate(self._answered(body, requests))
        ]

    def in_client_names(self, error: UserError, body: ChatBody) -> UserError:
        """See `Endpoint.in_client_names`. The limit of new tokens has two names."""
        named = super().in_client_names(error, body)
        is_newer = body.max_tokens is None and body.max_completion_tokens is not None
        if named.field == "max_tokens" and is_newer:
            return named.renamed("max_completion_tokens")
        return named

    def last_fields(self, body: ChatBody, writers: Sequence[Any]) -> Json:
        """See `Endpoint.last_fields`."""
        if body.prompt_logprobs is None:
            return {}
        logprobs = writers[0].prompt_logprobs
        values = prompt_logprobs(self._tokenizer, logprobs, body.prompt_logprobs)
        return {"prompt_logprobs": values}

    def _prompt_requests(self, number: int, body: ChatBody) -> list[Request]:
        use = _tool_use(body)
        prompt = self._prompts.tokens(
            rendered(body.messages),
            body.chat_template_kwargs or {},
            None if use is None else use.described,
        )
        limit = self._limit(body)
        kept = self._truncation(body, self._default_new_tokens if limit is None else limit)
        if limit is None:
            if body.truncate_prompt_tokens == -1 and len(prompt) < self._max_seq_len:
                kept = None  # it has room, if less than by default
            num_prompt_tokens = len(prompt) if kept is None else min(len(prompt), kept)
            limit = min(self._default_new_tokens, max(1, self._max_seq_len - num_prompt_tokens))
        own = {
            "max_new_tokens": limit,
            "truncate_prompt_tokens": kept,
            "logprobs": self._num_logprobs(body),
        }
        return self._build(number, [prompt], body, own)

    def _constraint(self, body: ChatBody) -> Constraint | None:
        text, use = super()._constraint(body), _tool_use(body)
        if use is None:
            return text
        if text is not None and text.kind != "json_schema":
            field = self.constraint_field(body, text.kind)
            raise UserError(field, text.kind, "a JSON schema with tools")
        schema = None if text is None else json.loads(text.source)
        return tool_constraint(replace(use.answers, text=schema))

    def _num_logprobs(self, body: ChatBody) -> int | None:
        if body.top_logprobs and not body.logprobs:
            raise UserError("top_logprobs", body.top_logprobs, "used with logprobs=true")
        return (body.top_logprobs or 0) if body.logprobs else None

    def _limit(self, body: ChatBody) -> int | None:
        """Return the limit of new tokens that a body sets, or None."""
        limits = {body.max_tokens, body.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise UserError(
                "max_tokens", body.max_tokens, "left out, or equal to max_completion_tokens"
            )
        return limits.pop() if limits else None

    def _object(self, body: ChatBody) -> str:
        return "chat.completion.chunk" if body.stream else "chat.completion"


def _tool_use(body: ChatBody) -> ToolUse | None:
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    return tool_use(tools, body.tool_choice, body.parallel_tool_calls)
