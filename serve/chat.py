"""From the messages of a chat to the text of a prompt, by the model directory's own template.

`chat_template.jinja` in the model directory, in a sandbox: a template cannot read files or change
what it is given. Without one, messages stand one behind the other, each after its role.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

FILE_NAME = "chat_template.jinja"
PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class ChatTemplate:
    """The template of a model directory. Raises ValueError if it is none."""

    def __init__(self, model: Path) -> None:
        path = model / FILE_NAME
        self.is_plain = not path.is_file()
        source = PLAIN if self.is_plain else path.read_text(encoding="utf-8")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"{path}: not a chat template: {error}") from error

    def render(self, messages: Sequence[dict[str, Any]], bos: str, eos: str) -> str:
        """The text of a prompt. Raises ValueError for messages that the template refuses."""
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos
            )
        except (TemplateError, TypeError, ArithmeticError, LookupError) as error:
            raise ValueError(f"messages cannot be written by the chat template: {error}") from error


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
