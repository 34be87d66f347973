"""Chat templates, which write the prompt of a chat.

The template of a model directory is its `chat_template.jinja`, else the `chat_template` of its
`tokenizer_config.json`, in Hugging Face's dialect of Jinja (`stu.chat.dialect`). Without
either, the prompt is the messages in order, each after its role.

A template also says on what of a conversation a model is trained, the answers: what it writes
inside `{% generation %}`; without that, what it adds to the prompt of each answer, up to its last
control token, such as EOS.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from stu.chat.dialect import CompiledTemplate
from stu.common.errors import UserError, show
from stu.common.text import require_unicode
from stu.tokenizer import Tokenizer, encode_text

FILE_NAME, CONFIG_NAME = "chat_template.jinja", "tokenizer_config.json"
PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TUNED = (
    "{% for message in messages %}{{ message.role + ':\\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
"""Template for models that are trained on conversations, if they have none: each content is on the
line after its role, and EOS ends answers."""
FAULTS = (TemplateError, TypeError, ArithmeticError, LookupError, ValueError, AttributeError)
"""Errors that a template may raise for messages that it was not written for."""


class ChatTemplate:
    """The chat template of a model directory, or of a file.

    Raises UserError if there is one that cannot be compiled.
    """

    def __init__(self, model: Path, tokenizer: Tokenizer, without: str = PLAIN) -> None:
        path, source = find_template(model)
        self.source = source = without if source is None else source
        self._tokenizer = tokenizer
        # Where the template names a control token, a secret mark stands for it until the text is
        # tokenized, so that nobody can write a control token in a message.
        control_ids = tokenizer.control_tokens()
        secret = secrets.token_hex(16)
        self._marks = {name: f"{secret}{token:08x}" for name, token in control_ids.items()}
        self._ids = {mark: control_ids[name] for name, mark in self._marks.items()}
        self._mark = re.compile(f"({secret}[0-9a-f]{{8}})")
        self._answer = f"{secret}<", f"{secret}>"  # before and after an answer
        self._answer_mark = re.compile(f"({secret}[<>])")
        names = {token: name for name, token in control_ids.items()}
        special = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._fixed: dict[str, Any] = {
            variable: self._marks[names[token]]
            for variable, token in special.items()
            if token in names
        }
        self._fixed |= {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            self._template = CompiledTemplate(source, self._marks, self._answer)
        except (TemplateError, SyntaxError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            place = f"{path}: line {line}" if line else f"{path}"
            message = f"{place}: the chat template cannot be compiled: {error}"
            raise UserError(str(path), message=message) from error

    def tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Return the token ids of the prompt, after BOS if there is one.

        Args:
            messages: With `role`, `content` and perhaps `name`.
            variables: More variables of the template.
            tools: Tools that the prompt describes, if the template knows any (`knows_tools`).

        Raises:
            UserError: The template refuses the messages, or `variables` has a name that is taken.
        """
        text = self._answer_mark.sub("", self._render(messages, variables or {}, tools=tools))
        return self._after_start(self._encode(text))

    @property
    def knows_tools(self) -> bool:
        """Whether the template writes tools into prompts."""
        return "tools" in self._template.variables

    def has_control_token(self, name: str) -> bool:
        """Return whether a control token has this name."""
        return name in self._marks

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
        """Return the token ids of a whole conversation, after BOS if there is one, and whether each
        belongs to an answer.

        No token is partly of an answer: before it are the tokens of its prompt. Raises UserError if
        the template refuses the messages, if it says nowhere what an answer is, or if there is
        none.
        """
        text = self._render(messages, {}, is_prompt=False)
        if self._answer_mark.search(text):
            pieces = self._between_marks(text)
        else:
            pieces = self._after_prompts(text, messages)
        tokens: list[int] = []
        counted: list[bool] = []
        for piece, is_answer in pieces:
            tokens += (encoded := self._encode(piece))
            counted += [is_answer] * len(encoded)
        if not any(counted):
            raise UserError("messages", message="the conversation has no text of an assistant")
        num_start = len(self._after_start(tokens)) - len(tokens)
        return self._after_start(tokens), [False] * num_start + counted

    def text(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> str:
        """Return the prompt as text with the names of control tokens; see `tokens`."""
        names = {mark: name for name, mark in self._marks.items()}
        text = self._answer_mark.sub("", self._render(messages, variables or {}))
        return self._mark.sub(lambda mark: names.get(mark[0], mark[0]), text)

    def _between_marks(self, text: str) -> list[tuple[str, bool]]:
        """Return the pieces of a text between the marks of answers, and whether each is one."""
        pieces, depth = [], 0
        for part in self._answer_mark.split(text):
            if part in self._answer:
                depth += 1 if part == self._answer[0] else -1
            else:
                pieces.append((part, depth > 0))
        return pieces

    def _after_prompts(
        self, text: str, messages: Sequence[Mapping[str, Any]]
    ) -> list[tuple[str, bool]]:
        """Return the pieces of a text without marks of answers: what follows the prompt of each
        answer is one, up to its last control token if there is any."""
        pieces, done = [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:number], {})
            whole = self._render(messages[: number + 1], {}, is_prompt=False)
            if not (len(prompt) >= done and whole.startswith(prompt) and text.startswith(whole)):
                raise UserError(
                    "messages",
                    message=f"message {number + 1}: the chat template writes this answer otherwise "
                    "in a longer conversation, or not after its prompt: put what is trained on in "
                    "{% generation %} blocks",
                )
            marks = list(self._mark.finditer(whole, len(prompt)))
            end = marks[-1].end() if marks else len(whole)
            pieces += [(text[done : len(prompt)], False), (text[len(prompt) : end], True)]
            done = end
        return [*pieces, (text[done:], False)]

    def _encode(self, text: str) -> list[int]:
        require_unicode("messages", text)
        tokens: list[int] = []
        for part in self._mark.split(text):
            if part in self._ids:
                tokens.append(self._ids[part])
            elif part:
                tokens += encode_text(self._tokenizer, "messages", part)
        return tokens

    def _after_start(self, tokens: list[int]) -> list[int]:
        start = self._tokenizer.start_ids
        return tokens if tokens[:1] == start else start + tokens

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        is_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        for name in variables:
            if name == "messages" or name in self._fixed or name in self._template.globals:
                fix = "the server sets this variable, leave it out"
                raise UserError(f"chat_template_kwargs.{name}", fix=fix)
        try:
            fixed = {**self._fixed, "add_generation_prompt": is_prompt}
            fixed["messages"] = self._with_known_roles(messages)
            return self._template.render({**variables, **fixed, "tools": tools})
        except (*FAULTS, RecursionError) as error:
            is_deep = isinstance(error, RecursionError)
            reason = "it is nested too deeply" if is_deep else str(error)
            raise UserError(
                "messages", reason, message=f"the chat template cannot write messages: {reason}"
            ) from error

    def _with_known_roles(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
        """Return the messages, those of role developer as system messages if the template does not
        mention the role: most templates leave out roles that they do not know."""
        if "developer" in self.source:
            return messages
        return [
            {**message, "role": "system"} if message.get("role") == "developer" else message
            for message in messages
        ]


def find_template(model: Path) -> tuple[Path, str | None]:
    """Return the file of a model directory that may have a template, or the file that `model` is,
    and the template, if there is any. Raises UserError."""
    path = model if model.is_file() else model / FILE_NAME
    if path.is_file():
        return path, _read(path)
    path = model / CONFIG_NAME
    if not path.is_file():
        return path, None
    try:
        config = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise UserError(str(path), message=f"{path}: not JSON: {error}") from error
    return path, template_of(config if isinstance(config, dict) else {}, path)


def template_of(config: Mapping[str, Any], path: Path) -> str | None:
    """Return the template in the contents of the tokenizer_config.json at `path`, if there is any.
    Raises UserError."""
    template = config.get("chat_template")
    field, allowed = f"{path}: chat_template", "a string, or a list of templates with names"
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        template = named.get("default")
        if not isinstance(template, str):
            names = ", ".join(map(show, named))
            fix = f'it has templates named {names}, name one "default"'
            raise UserError(field, fix=fix)
    if template is not None and not isinstance(template, str):
        raise UserError(field, template, allowed)
    return template


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(str(path), message=f"{path}: not UTF-8, convert the file") from error
