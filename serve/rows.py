"""The rows of a batch: one JSON object a line in, requests that can be decoded out."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve.sampling import SamplingParams
from stu.config import nearest
from stu.tokenizer import Tokenizer

SETTINGS = ["max_new_tokens", *asdict(SamplingParams())]
FIELDS = ["prompt", "id", *SETTINGS]


@dataclass(frozen=True)
class Request:
    """A prompt to decode."""

    id: str | int
    prompt: str
    tokens: list[int]
    """The prompt, with BOS before it."""
    max_new_tokens: int
    sampling: SamplingParams


@dataclass(frozen=True)
class Refusal:
    """A row that cannot be decoded."""

    id: str | int
    error: str
    """Line (from 1), field, value, what is allowed, and what to do."""


def read_rows(
    path: Path, tokenizer: Tokenizer, max_seq_len: int, defaults: Mapping[str, Any]
) -> list[Request | Refusal]:
    """Every row of the JSONL file `path` that is not blank, in order.

    A row is `{"prompt": str, "id": str or int, ...}`; all but the prompt may be missing. The `id`
    is then the number of the line, from 0; a setting is the one of `defaults`, which has all
    `SETTINGS`; and the seed is drawn from the default one and the number of the line, so that equal
    prompts get different completions.

    Raises ValueError if `path` is not a file of UTF-8 text, or the defaults are not valid.
    """
    _settings(defaults)
    rows: list[Request | Refusal] = []
    lines_of_ids: dict[str | int, int] = {}
    for number, line in enumerate(_read_text(path).split("\n")):
        if not line.strip():
            continue
        row_id: str | int = number
        try:
            row = _parse(line)
            row_id = _id(row, number)
            if row_id in lines_of_ids:
                raise ValueError(
                    f"id={row_id!r} is taken by line {lines_of_ids[row_id] + 1}: give another "
                    "(a row without an id has its line's number, from 0)"
                )
            lines_of_ids[row_id] = number
            settings = {**defaults, "seed": _row_seed(defaults["seed"], number), **row}
            rows.append(_request(row_id, settings, tokenizer, max_seq_len))
        except ValueError as error:
            rows.append(Refusal(row_id, f"line {number + 1}: {error}"))
    return rows


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"input {path}: no such file")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"input {path}: line {line} is not UTF-8; convert the file") from error


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not JSON ({error.msg}, column {error.colno}): write one object a line"
        ) from error
    except (ValueError, RecursionError) as error:  # numbers too long, nesting too deep
        raise ValueError(f"not JSON that can be read ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f'{_show(row)} is not a JSON object: write {{"prompt": "..."}}')
    return row


def _id(row: Mapping[str, Any], number: int) -> str | int:
    row_id = row.get("id", number)
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise ValueError(f"id={_show(row_id)} is not allowed: it must be a string or whole number")
    _require_unicode("id", row_id if isinstance(row_id, str) else "")
    return row_id


def _request(
    row_id: str | int, row: Mapping[str, Any], tokenizer: Tokenizer, max_seq_len: int
) -> Request:
    for key in row:
        if key not in FIELDS:
            raise ValueError(f"unknown field {_show(key)}{nearest(key, FIELDS)}")
    if "prompt" not in row:
        raise ValueError('field "prompt" is missing: give a string, "" to start from nothing')
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        raise ValueError(f"prompt={_show(prompt)} is not allowed: it must be a string")
    _require_unicode("prompt", prompt)
    max_new_tokens, sampling = _settings({name: row[name] for name in SETTINGS})
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if len(tokens) + max_new_tokens > max_seq_len:
        room = max_seq_len - len(tokens)
        lower = f"lower max_new_tokens to {room} or " if room > 0 else ""
        raise ValueError(
            f"prompt of {len(tokens)} tokens with BOS and max_new_tokens={max_new_tokens} exceed "
            f"the model's max_seq_len={max_seq_len}: {lower}shorten the prompt"
        )
    return Request(row_id, prompt, tokens, max_new_tokens, sampling)


def _settings(values: Mapping[str, Any]) -> tuple[int, SamplingParams]:
    for key in values:
        if key not in SETTINGS:
            raise ValueError(f"unknown generation setting {key!r}{nearest(key, SETTINGS)}")
    others = dict(values)
    count = others.pop("max_new_tokens")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(
            f"max_new_tokens={_show(count)} is not allowed: it must be a whole number >= 1"
        )
    return count, SamplingParams(**others)


def _row_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1, np.uint64)[0])


def _require_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half of a surrogate pair at character {error.start}: "
            "write the whole character"
        ) from error


def _show(value: object) -> str:
    """`value` as JSON, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."
