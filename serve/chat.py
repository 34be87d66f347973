"""From the messages of a chat to the text of a prompt, by the model directory's own template.

`chat_template.jinja` in the model directory, in a sandbox: a template cannot read files or change
what it is given. Without one, messages stand one behind the other, each after its role.
"""

import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serve.prompts import require_unicode
from stu.tokenizer import Tokenizer

FILE_NAME = "chat_template.jinja"
PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class ChatTemplate:
    """The template of a model directory. Raises ValueError if it is none."""

    def __init__(self, model: Path, tokenizer: Tokenizer) -> None:
        path = model / FILE_NAME
        self._tokenizer = tokenizer
        source = path.read_text(encoding="utf-8") if path.is_file() else PLAIN
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        # Stand for BOS and EOS, so that nobody can write these in a message.
        self._marks = {secrets.token_hex(16): its for its in (tokenizer.bos_id, tokenizer.eos_id)}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"{path}: not a chat template: {error}") from error

    def tokens(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The prompt, BOS first. Raises ValueError for messages that the template refuses."""
        bos, eos = self._marks
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos
            )
        except (TemplateError, TypeError, ArithmeticError, LookupError) as error:
            raise ValueError(f"messages cannot be written by the chat template: {error}") from error
        require_unicode("messages", text)
        tokens: list[int] = []
        for part in re.split(f"({bos}|{eos})", text):
            tokens += [self._marks[part]] if part in self._marks else self._tokenizer.encode(part)
        starts = tokens[:1] == [self._tokenizer.bos_id]
        return tokens if starts else [self._tokenizer.bos_id, *tokens]


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
