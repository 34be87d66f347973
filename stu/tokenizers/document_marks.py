"""BOS and EOS of a tokenizer.json, which does not name them itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stu.common.errors import UserError, show

FIELDS = ("bos_token", "eos_token")
"""Fields of tokenizer_config.json."""
KNOWN = "TemplateProcessing, BertProcessing, RobertaProcessing, ByteLevel, or a Sequence of these"


def document_marks(
    config: Mapping[str, Any], config_path: Path, processor: Any, path: Path
) -> tuple[str | None, str | None]:
    """Return the names of BOS and EOS; None stands for none.

    A token that `config` does not mention is the one that the post-processor adds to texts. If that
    adds no BOS, EOS takes its place.

    Args:
        config: Contents of tokenizer_config.json, empty if there is no such file.
        config_path: Its path, for messages.
        processor: Value of `post_processor` in the tokenizer.json.
        path: Path of the tokenizer.json, for messages.

    Raises UserError for a value of another form, and if several tokens are added on one side.
    """
    names = {
        field: _token_name(config[field], field, config_path) for field in FIELDS if field in config
    }
    if config.get("add_bos_token") is False:
        names["bos_token"] = None
    if "eos_token" not in names:
        names["eos_token"] = _only(_added(processor, path)[1], "eos_token", path)
    if "bos_token" not in names:
        added = _only(_added(processor, path)[0], "bos_token", path)
        names["bos_token"] = added or names["eos_token"]
    return names["bos_token"], names["eos_token"]


def _token_name(value: Any, field: str, path: Path) -> str | None:
    """Return the name of a token that a configuration writes as its name or as an object."""
    name = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(name, str):
        allowed = "null, the name of a token, or an object with its content"
        message = f"tokenizer {path}: {field} must be {allowed}, not {show(value)}"
        raise UserError(message=message)
    return name


def _only(tokens: list[str], field: str, path: Path) -> str | None:
    if len(tokens) > 1:
        place = {"bos_token": "before", "eos_token": "after"}[field]
        reason = f"its post-processor adds several tokens {place} a text, {show(tokens)}"
        fix = f"name one of them as {field} in a tokenizer_config.json beside it"
        raise UserError(message=f"tokenizer {path}: {reason}: {fix}")
    return tokens[0] if tokens else None


def _added(processor: Any, path: Path) -> tuple[list[str], list[str]]:
    """Return the tokens that a post-processor adds before and after a text. Raises UserError."""
    if processor is None:
        return [], []
    try:
        return _added_by(processor)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        fix = f"it must be {KNOWN}, or tokenizer_config.json must name bos_token and eos_token"
        message = f"tokenizer {path}: its post_processor is of an unknown form: {fix}"
        raise UserError(message=message) from error


def _added_by(processor: Any) -> tuple[list[str], list[str]]:
    kind = processor["type"]
    before: list[str] = []
    after: list[str] = []
    if kind == "Sequence":
        for part in processor["processors"]:
            first, last = _added_by(part)
            before, after = before + first, after + last
    elif kind in ("BertProcessing", "RobertaProcessing"):
        before, after = [processor["cls"][0]], [processor["sep"][0]]
    elif kind == "TemplateProcessing":
        side = before
        for piece in processor["single"]:
            if "Sequence" in piece:
                side = after
            else:
                side += processor["special_tokens"][piece["SpecialToken"]["id"]]["tokens"]
    elif kind != "ByteLevel":
        raise KeyError(kind)
    return before, after
