"""The JSON that describes a tokenizer's special tokens, and which of them begin and end texts."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from stu.common.errors import UserError
from stu.common.text import require_unicode

MOST_IDS = 1 << 24
"""Limit of token ids, above any vocabulary's."""


def read_json(contents: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object in the file `path`. Raises UserError."""
    try:
        values = json.loads(contents)
    except ValueError as error:
        raise UserError(message=f"tokenizer {path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(message=f"tokenizer {path}: a JSON object is needed")
    return values


def token_ids(values: Mapping[str, Any], field: str, path: Path) -> dict[str, int]:
    """Return a field with ids by token, which may be missing. Raises UserError."""
    ids = values.get(field) or {}
    if not isinstance(ids, dict) or not all(map(_is_id, ids.values())) or "" in ids:
        allowed = f"an object of ids by token, each from 0 to {MOST_IDS - 1}"
        raise UserError(message=f"tokenizer {path}: {field} must be {allowed}")
    for token in ids:
        require_unicode(f"tokenizer {path}: {field}", token)
    return ids


def blank_tokens(ids: Collection[int], path: Path) -> list[bytes]:
    """Return a list with room for the bytes of tokens of these ids, all of them empty.

    Raises UserError if there are no tokens, or if the list would be too long.
    """
    if not ids:
        raise UserError(message=f"tokenizer {path}: it has no tokens")
    if max(ids) >= MOST_IDS:
        reason = f"it has a token of id {max(ids)}, and ids may be up to {MOST_IDS - 1}"
        raise UserError(message=f"tokenizer {path}: {reason}")
    return [b""] * (max(ids) + 1)


def marks(values: Mapping[str, Any], special: Mapping[str, int], path: Path) -> tuple[int, int]:
    """Return the ids of BOS and EOS, -1 for none. EOS takes the place of a BOS that is not
    mentioned. Raises UserError."""
    eos = named_id(values, "eos_token", special, path)
    bos = named_id(values, "bos_token", special, path) if "bos_token" in values else eos
    return bos, eos


def named_id(values: Mapping[str, Any], field: str, special: Mapping[str, int], path: Path) -> int:
    """Return the id of the special token that a field names, -1 for none. Raises UserError."""
    name = values.get(field)
    if name is None:
        return -1
    if not isinstance(name, str) or name not in special:
        allowed = f"null or one of special_tokens ({', '.join(special)})"
        raise UserError(message=f"tokenizer {path}: {field} must be {allowed}")
    return special[name]


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_IDS
