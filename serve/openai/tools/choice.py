"""Tools that a body offers, and which of them its answer may or must call."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.sampling.tool_grammar import CallableTool, ToolAnswers
from stu.common.errors import UNSET, UserError
from stu.common.text import Json, nearest

MOST_TOOLS = 128
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
NAME_ALLOWED = "1 to 64 letters, digits, underscores and hyphens"
WORDS = ("none", "auto", "required")
CHOICES = (
    'none, auto, required, {"type": "function", "function": {"name": ".."}}, or '
    '{"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [..]}}'
)


@dataclass(frozen=True)
class ToolUse:
    """Tools that a prompt describes, and the calls that its answer may have."""

    described: Sequence[Json]
    """OpenAI's objects, for the chat template."""
    answers: ToolAnswers


def tool_use(
    tools: Sequence[Json] | None, choice: str | Mapping[str, Any] | None, calls_several: bool | None
) -> ToolUse | None:
    """Return how an answer uses tools, or None if it has no calls.

    Args:
        tools: Tools of the body, `{"type": "function", "function": {"name": ..}}`.
        choice: `tool_choice` of the body.
        calls_several: `parallel_tool_calls` of the body, true by default.

    Raises:
        UserError: Two tools have the same name, or the choice is not one of them.
    """
    functions = {tool["function"]["name"]: tool["function"] for tool in tools or ()}
    if len(functions) < len(tools or ()):
        names = [tool["function"]["name"] for tool in tools or ()]
        name = next(name for name in names if names.count(name) > 1)
        raise UserError("tools", name, message=f"tools: several have the name {name!r}")
    mode, allowed = _chosen(choice or "auto", list(functions))
    if mode == "none" or (mode == "auto" and not functions):
        return None
    callable_tools = [
        CallableTool(name, functions[name].get("parameters"), functions[name].get("strict") is True)
        for name in allowed
    ]
    several = calls_several is not False
    answers = ToolAnswers(callable_tools, mode == "required", several)
    described = [
        {
            "type": "function",
            "function": {key: function[key] for key in function if key != "strict"},
        }
        for function in functions.values()
    ]
    return ToolUse(described, answers)


def _chosen(choice: str | Mapping[str, Any], known: list[str]) -> tuple[str, list[str]]:
    """Return whether calls are none, auto or required, and the names that may be called."""
    if isinstance(choice, str):
        if choice not in WORDS:
            raise UserError("tool_choice", choice, CHOICES)
        mode, names = choice, known
    elif choice.get("type") == "function":
        names = [_name(choice)]
        mode = "required"
    elif choice.get("type") == "allowed_tools":
        listed = choice.get("allowed_tools")
        listed = listed if isinstance(listed, Mapping) else {}
        mode, entries = str(listed.get("mode")), listed.get("tools")
        if mode not in ("auto", "required") or not isinstance(entries, list) or not entries:
            raise UserError(
                "tool_choice.allowed_tools", UNSET, 'like {"mode": "auto", "tools": [..]}'
            )
        names = list(dict.fromkeys(map(_name, entries)))
    else:
        raise UserError("tool_choice.type", choice.get("type"), "function or allowed_tools")
    for name in names:
        if name not in known:
            hint = nearest(name, known) if known else ": there are none"
            message = f"tool_choice: tools has no function {name[:100]!r}{hint}"
            raise UserError("tool_choice", name, message=message)
    if mode == "required" and not names:
        raise UserError("tool_choice", choice, fix="tools has none, leave it out")
    return mode, names


def _name(entry: Any) -> str:
    """Return the name in `{"type": "function", "function": {"name": ..}}`."""
    function = entry.get("function") if isinstance(entry, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or entry.get("type") != "function":
        allowed = 'like {"type": "function", "function": {"name": ".."}}'
        raise UserError("tool_choice", UNSET, allowed)
    return name
