"""Chat templates, which write the prompt of a chat.

The template of a model directory is its `chat_template.jinja`, else the `chat_template` of its
`tokenizer_config.json`, in Hugging Face's dialect of Jinja (`serve.openai.chat_dialect`). Without
either, the prompt is the messages in order, each after its role.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from serve.openai.chat_dialect import CompiledTemplate
from serve.prompts import encode_text
from stu.common.errors import UserError, show
from stu.common.text import require_unicode
from stu.tokenizer import Tokenizer

FILE_NAME, CONFIG_NAME = "chat_template.jinja", "tokenizer_config.json"
PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
FAULTS = (TemplateError, TypeError, ArithmeticError, LookupError, ValueError, AttributeError)
"""Errors that a template may raise for messages that it was not written for."""


class ChatTemplate:
    """The chat template of a model directory.

    Raises UserError if the directory has a template that cannot be compiled.
    """

    def __init__(self, model: Path, tokenizer: Tokenizer) -> None:
        path, source = _find(model)
        self.source = source
        self._tokenizer = tokenizer
        # Where the template names a control token, a secret mark stands for it until the text is
        # tokenized, so that nobody can write a control token in a message.
        control_ids = tokenizer.control_tokens()
        secret = secrets.token_hex(16)
        self._marks = {name: f"{secret}{token:08x}" for name, token in control_ids.items()}
        self._ids = {mark: control_ids[name] for name, mark in self._marks.items()}
        self._mark = re.compile(f"({secret}[0-9a-f]{{8}})")
        names = {token: name for name, token in control_ids.items()}
        special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._fixed: dict[str, Any] = {
            variable: self._marks[names[token]]
            for variable, token in special.items()
            if token in names
        }
        self._fixed |= {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            self._template = CompiledTemplate(source, self._marks)
        except (TemplateError, SyntaxError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            place = f"{path}: line {line}" if line else f"{path}"
            message = f"{place}: the chat template cannot be compiled: {error}"
            raise UserError(str(path), message=message) from error

    def tokens(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the token ids of the prompt, after BOS if there is one.

        Args:
            messages: With `role`, `content` and perhaps `name`.
            variables: More variables of the template.

        Raises:
            UserError: The template refuses the messages, or `variables` has a name that is taken.
        """
        text = self._render(messages, variables or {})
        require_unicode("messages", text)
        tokens: list[int] = []
        for part in self._mark.split(text):
            if part in self._ids:
                tokens.append(self._ids[part])
            elif part:
                tokens += encode_text(self._tokenizer, "messages", part)
        start = self._tokenizer.start_ids
        return tokens if tokens[:1] == start else start + tokens

    def text(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> str:
        """Return the prompt as text with the names of control tokens; see `tokens`."""
        names = {mark: name for name, mark in self._marks.items()}
        text = self._render(messages, variables or {})
        return self._mark.sub(lambda mark: names.get(mark[0], mark[0]), text)

    def _render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        for name in variables:
            if name == "messages" or name in self._fixed or name in self._template.globals:
                fix = "the server sets this variable, leave it out"
                raise UserError(f"chat_template_kwargs.{name}", fix=fix)
        try:
            return self._template.render({**variables, **self._fixed, "messages": messages})
        except (*FAULTS, RecursionError) as error:
            is_deep = isinstance(error, RecursionError)
            reason = "it is nested too deeply" if is_deep else str(error)
            raise UserError(
                "messages", reason, message=f"the chat template cannot write messages: {reason}"
            ) from error


def _find(model: Path) -> tuple[Path, str]:
    """Return the file of a model directory that has a template, and the template."""
    path = model / FILE_NAME
    if path.is_file():
        return path, _read(path)
    path = model / CONFIG_NAME
    if not path.is_file():
        return path, PLAIN
    try:
        config = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise UserError(str(path), message=f"{path}: not JSON: {error}") from error
    template = config.get("chat_template") if isinstance(config, dict) else None
    field, allowed = f"{path}: chat_template", "a string, or a list of templates with names"
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {entry.get("name"): entry.get("template") for entry in entries}
        template = named.get("default")
        if not isinstance(template, str):
            names = ", ".join(map(show, named))
            fix = f'it has templates named {names}, name one "default"'
            raise UserError(field, fix=fix)
    if template is not None and not isinstance(template, str):
        raise UserError(field, template, allowed)
    return path, PLAIN if template is None else template


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(str(path), message=f"{path}: not UTF-8, convert the file") from error
