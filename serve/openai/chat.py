"""From the messages of a chat to the tokens of a prompt, by the model directory's own template.

The template is `chat_template.jinja` in the model directory, or the `chat_template` of its
`tokenizer_config.json`, in Hugging Face's dialect of Jinja (`serve.openai.chat_dialect`). Without
either, messages stand one behind the other, each after its role.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from serve.openai.chat_dialect import CompiledTemplate
from stu.common.errors import show
from stu.common.text import require_unicode
from stu.tokenizer import Tokenizer

FILE_NAME, CONFIG_NAME = "chat_template.jinja", "tokenizer_config.json"
PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
FAULTS = (TemplateError, TypeError, ArithmeticError, LookupError, ValueError, AttributeError)
"""Errors that a template may raise for messages that it was not made for."""


class ChatTemplate:
    """The template of a model directory. Raises ValueError if it is none."""

    def __init__(self, model: Path, tokenizer: Tokenizer) -> None:
        path, source = _find(model)
        self.source = source
        self._tokenizer = tokenizer
        # A mark stands for a control token wherever the template names one, so that nobody can
        # write it in a message.
        self._marks = {name: secrets.token_hex(16) for name in tokenizer.control_tokens()}
        control_ids = tokenizer.control_tokens()
        self._ids = {mark: control_ids[name] for name, mark in self._marks.items()}
        names = {its: name for name, its in control_ids.items()}
        self._fixed: dict[str, Any] = {
            name: self._marks[names[token]]
            for name, token in {
                "bos_token": tokenizer.bos_id,
                "eos_token": tokenizer.eos_id,
            }.items()
            if token in names
        }
        self._fixed |= {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            self._template = CompiledTemplate(source, self._marks)
        except (TemplateError, SyntaxError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            place = f"{path}: line {line}" if line else f"{path}"
            raise ValueError(f"{place}: not a chat template: {error}") from error

    def tokens(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The prompt, BOS first. Raises ValueError for messages that the template refuses, or
        `variables` that it may not be given."""
        text = self._render(messages, variables or {})
        require_unicode("messages", text)
        tokens: list[int] = []
        for part in re.split("|".join(f"({mark})" for mark in self._ids), text):
            if part in self._ids:
                tokens.append(self._ids[part])
            elif part:
                tokens += self._tokenizer.encode(part)
        starts = tokens[:1] == [self._tokenizer.bos_id]
        return tokens if starts else [self._tokenizer.bos_id, *tokens]

    def text(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> str:
        """The prompt as text, control tokens by their names. Raises ValueError as `tokens` does."""
        text = self._render(messages, variables or {})
        for name, mark in self._marks.items():
            text = text.replace(mark, name)
        return text

    def _render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        for name in variables:
            if name == "messages" or name in self._fixed or name in self._template.globals:
                raise ValueError(
                    f"chat_template_kwargs has {show(name)}, which the server sets: leave it out"
                )
        try:
            return self._template.render({**variables, **self._fixed, "messages": messages})
        except RecursionError as error:
            raise ValueError("messages are too deep for the chat template") from error
        except FAULTS as error:
            raise ValueError(f"messages cannot be written by the chat template: {error}") from error


def _find(model: Path) -> tuple[Path, str]:
    """Return a template's file and its source. Raises ValueError for a file that has none."""
    path = model / FILE_NAME
    if path.is_file():
        return path, _read(path)
    path = model / CONFIG_NAME
    if not path.is_file():
        return path, PLAIN
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    found = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(found, list):
        named = {its.get("name"): its.get("template") for its in found if isinstance(its, dict)}
        if not isinstance(named.get("default"), str):
            raise ValueError(
                f"{path}: chat_template has none with the name default, only "
                f"{', '.join(map(show, named))}: name one so"
            )
        found = named["default"]
    if found is not None and not isinstance(found, str):
        raise ValueError(
            f"{path}: chat_template={show(found)} is not allowed: it must be a string, or a list "
            "of named ones"
        )
    return path, PLAIN if found is None else found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: convert the file") from error
