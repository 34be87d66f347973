"""Conversations for training: written by a chat template, and packed whole into rows.

A row has `seq_len` tokens. It is filled with whole conversations and then with padding, so that a
sample of `data.seq_len` tokens is a row, and its last target the first token of the next row. Only
the tokens of answers count as targets.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stu.chat.template import FILE_NAME, TUNED, ChatTemplate, find_template
from stu.common.errors import UserError, show
from stu.tokenizer import Tokenizer, read_tokenizer
from train.data.config import JSON_LINES, PrepareConfig
from train.data.encode import split_of, token_dtype
from train.data.reading.document import BadInput, Document
from train.data.reading.remote import InputFile
from train.data.reading.skipped import Skipped
from train.data.reading.sources import Files, kind_of
from train.data.shards import ANSWERS_SUFFIX, SplitWriter

MOST_OPEN_ROWS = 256
"""Rows that are being filled at a time."""
NEEDED = '{"messages": [{"role": .., "content": ..}, ..]}'


class Conversation(NamedTuple):
    """An encoded conversation."""

    split: str  # "train" or "validation"
    tokens: NDArray[Any]  # [tokens]
    answers: NDArray[np.bool_]  # [tokens]: whether a token belongs to an answer
    num_bytes: int  # of the messages' text in UTF-8


class Refusal(NamedTuple):
    """A row that is not a conversation, or not one of a length that can be trained on."""

    path: InputFile
    place: str
    kind: str
    reason: str


def require_json_lines(config: PrepareConfig, files: Files) -> None:
    """Raise UserError unless all files of conversations are JSON lines."""
    for path in files.documents:
        if (config.kind or kind_of(path)) != JSON_LINES:
            message = f"source {path}: conversations are JSON lines, in .jsonl files (also as .gz "
            message += "or .zst); name these alone, or write its conversations to one"
            raise UserError("SOURCE", str(path), message=message)


def write_template(config: PrepareConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the chat template of conversations to `folder`. Raises UserError."""
    given, source = config.chat_template, None
    if given is not None:
        if (source := find_template(given)[1] if given.exists() else None) is None:
            raise UserError("chat_template", given, "a file, or a folder with a chat template")
    elif (path := Path(config.tokenizer)).exists():
        source = find_template(path if path.is_dir() else path.parent)[1]
    if source is None and tokenizer.eos_id < 0:
        fix = "give one, as the tokenizer has no EOS token, with which answers would end"
        raise UserError("chat_template", fix=fix)
    (folder / FILE_NAME).write_text(TUNED if source is None else source, encoding="utf-8")
    ChatTemplate(folder, tokenizer)  # raises if it cannot be compiled


def conversation_encoder(
    config: PrepareConfig, folder: Path
) -> Callable[[list[Document]], list[Conversation | Refusal]]:
    """Return the function by which workers encode conversations.

    folder: it has the tokenizer and the chat template.
    """
    return partial(
        _encode_batch,
        folder=folder,
        seed=config.seed,
        validation_fraction=config.validation_fraction,
        seq_len=config.chat_seq_len,
    )


def write_rows(
    conversations: Iterable[Conversation | Refusal],
    writers: Mapping[str, SplitWriter],
    folder: Path,
    config: PrepareConfig,
    padding: int,
    skipped: Skipped,
) -> dict[str, str]:
    """Pack conversations into rows, write these, and return the checksums of the answers by split.

    Args:
        conversations: In the order of the sources.
        writers: By split.
        folder: Folder of the token shards, for the files of answers.
        config: Settings; with `on_error="skip"` refusals are counted in `skipped`.
        padding: Token that fills rows.
        skipped: Counts of what was left out.

    Raises UserError at the first refusal if `on_error` is "stop".
    """
    with ExitStack() as stack:
        packers = {
            split: stack.enter_context(
                _Packer(writer, folder / f"{split}{ANSWERS_SUFFIX}", config.chat_seq_len, padding)
            )
            for split, writer in writers.items()
        }
        for found in conversations:
            if isinstance(found, Conversation):
                packers[found.split].add(found)
                continue
            bad = BadInput(*found)
            if config.on_error == "stop":
                raise UserError(str(bad.path), message=str(bad))
            skipped.add(bad)
        return {split: packer.finish() for split, packer in packers.items()}


@dataclass(eq=False)
class _Row:
    """A row that is being filled."""

    conversations: list[Conversation]
    num_tokens: int


class _Packer:
    """Rows of one split: a conversation goes to the fullest open row that has room for it."""

    def __init__(self, writer: SplitWriter, answers: Path, seq_len: int, padding: int) -> None:
        self._writer, self._seq_len, self._padding = writer, seq_len, padding
        self._file, self._sha256 = answers.open("wb"), hashlib.sha256()
        self._open: list[_Row] = []

    def __enter__(self) -> "_Packer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, conversation: Conversation) -> None:
        """Put a conversation of at most `seq_len` tokens into a row."""
        size = len(conversation.tokens)
        fitting = [row for row in self._open if row.num_tokens + size <= self._seq_len]
        if fitting:
            row = max(fitting, key=lambda row: row.num_tokens)
            row.conversations.append(conversation)
            row.num_tokens += size
        else:
            row = _Row([conversation], size)
            self._open.append(row)
        if row.num_tokens == self._seq_len or len(self._open) > MOST_OPEN_ROWS:
            self._write(max(self._open, key=lambda row: row.num_tokens))

    def finish(self) -> str:
        """Write the open rows and the token that ends the last one, and return the checksum of the
        answers."""
        while self._open:
            self._write(self._open[0])
        self._pad(1)
        return self._sha256.hexdigest()

    def _write(self, row: _Row) -> None:
        self._open.remove(row)
        for conversation in row.conversations:
            self._writer.add(conversation.tokens, conversation.num_bytes)
            self._write_answers(conversation.answers)
        self._pad(self._seq_len - row.num_tokens)

    def _pad(self, count: int) -> None:
        if count:
            self._writer.add(np.full(count, self._padding), 0, starts=False)
            self._write_answers(np.zeros(count, dtype=np.bool_))

    def _write_answers(self, answers: NDArray[np.bool_]) -> None:
        contents = answers.astype(np.uint8).tobytes()
        self._file.write(contents)
        self._sha256.update(contents)


def _encode_batch(
    documents: list[Document], folder: Path, seed: int, validation_fraction: float, seq_len: int
) -> list[Conversation | Refusal]:
    """Encode a batch of rows, in a worker."""
    template, tokenizer = _load(folder)
    dtype = token_dtype(tokenizer.vocab_size)
    encoded: list[Conversation | Refusal] = []
    for document in documents:
        try:
            messages = parse_messages(document.text)
            ids, answers = template.conversation(messages)
        except UserError as error:
            place = document.path, document.place
            encoded.append(Refusal(*place, "not a conversation", str(error)))
            continue
        if len(ids) > seq_len:
            reason = f"{len(ids):,} tokens, more than --chat-seq-len {seq_len:,}: raise that, or "
            reason += "leave such conversations out with --on-error skip"
            encoded.append(Refusal(document.path, document.place, "too long", reason))
            continue
        split = split_of(document.text, seed, validation_fraction)
        num_bytes = sum(len(message["content"].encode()) for message in messages)
        encoded.append(
            Conversation(split, np.array(ids, dtype=dtype), np.array(answers), num_bytes)
        )
    return encoded


def parse_messages(line: str) -> list[dict[str, Any]]:
    """Return the messages of a row. Raises UserError if it is not a conversation."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(message=f"not JSON ({error}); a row must be {NEEDED}") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(message=f"a row must be {NEEDED}")
    for number, message in enumerate(messages):
        fields = message if isinstance(message, dict) else {}
        for name in ("role", "content"):
            if not isinstance(fields.get(name), str):
                field = f"messages[{number}].{name}"
                raise UserError(message=f"{field}={show(fields.get(name))}: it must be a string")
    return messages


@lru_cache(maxsize=1)
def _load(folder: Path) -> tuple[ChatTemplate, Tokenizer]:
    tokenizer = read_tokenizer(folder)
    return ChatTemplate(folder, tokenizer), tokenizer
