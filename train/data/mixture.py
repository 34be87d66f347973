"""Folders of token shards to train on: one, or several with weights.

```
DIR/mixture.json       names and weights of the sources
DIR/NAME/              token shards of a source (see `train.data.shards`), all by one tokenizer
```
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stu.common.errors import UserError
from stu.common.files import new_file, read_json_object
from train.data.rows.starts import starts_file
from train.data.shards import INDEX_FILE, Index, TokenShards

MIXTURE_FILE = "mixture.json"
FORMAT_VERSION = 1
NAME = re.compile(r"\w[\w-]*", re.ASCII)
EXAMPLE = '{"name": "code", "weight": 3}'
NAME_ALLOWED = "letters, digits, `_` and `-`, not beginning with `-`"


@dataclass(frozen=True, eq=False)
class Source:
    """Token shards of one source of a mixture, or the only ones."""

    name: str
    """Name in the mixture; empty for token shards that are no part of one."""
    weight: float
    """Weight that the mixture gives it."""
    train: TokenShards
    validation: TokenShards

    @property
    def label(self) -> str:
        """Words that name the source in messages, after a space; empty without a name."""
        return f" of source {self.name}" if self.name else ""

    @property
    def is_packable(self) -> bool:
        """Whether it has documents for training, with files that say where they begin, and they are
        not conversations, which are packed already."""
        shards = self.train.split.shards
        if self.train.index.chat_seq_len or not self.train.split.num_documents:
            return False
        return all(starts_file(self.train.folder / shard.file).exists() for shard in shards)


def open_sources(folder: str | Path) -> list[Source]:
    """Open a mixture or a folder of token shards.

    Raises UserError if a source is missing or damaged, or has another tokenizer than the first.
    """
    weights = read_weights(Path(folder))
    sources = []
    for name, weight in weights.items():
        path = Path(folder) / name
        source = Source(name, weight, TokenShards(path, "train"), TokenShards(path, "validation"))
        sources.append(source)
        if source.train.index.tokenizer_sha256 != sources[0].train.index.tokenizer_sha256:
            first = sources[0].train.folder
            raise UserError(
                str(path),
                message=f"{path}: made with another tokenizer than {first}; prepare one of them "
                "again, with --tokenizer and the folder of the other",
            )
    return sources


def read_weights(folder: Path) -> dict[str, float]:
    """Return the weight of each source; a folder of token shards has one, whose name is empty.

    Raises UserError if `mixture.json` cannot be used.
    """
    path = folder / MIXTURE_FILE
    if not path.is_file():
        return {"": 1.0}
    data = read_json_object(path)
    try:
        return _weights(data)
    except UserError as error:
        raise UserError(error.field, message=f"{path}: not a mixture: {error}") from error


def _weights(data: Mapping[str, Any]) -> dict[str, float]:
    """Return the weight of each source in the contents of `mixture.json`. Raises UserError."""
    version, sources = data.get("format_version"), data.get("sources")
    if version != FORMAT_VERSION:
        raise UserError("format_version", version, str(FORMAT_VERSION))
    if not isinstance(sources, list) or not sources:
        raise UserError("sources", sources, f"a list of {EXAMPLE}, one for each folder")
    weights: dict[str, float] = {}
    for i, source in enumerate(sources):
        if not isinstance(source, dict):
            raise UserError(f"sources[{i}]", source, f"an object such as {EXAMPLE}")
        name = source.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in weights:
            raise UserError(f"sources[{i}].name", name, f"{NAME_ALLOWED}, and in no other source")
        weight: Any = source.get("weight")
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (is_number and 0 <= weight <= sys.float_info.max):
            raise UserError(f"sources[{i}].weight", weight, "a finite number >= 0")
        weights[name] = float(weight)
    return weights


def save_mixture(folder: Path, weights: Mapping[str, float]) -> None:
    """Write `mixture.json` for sources whose token shards are in `folder`."""
    sources = [{"name": name, "weight": weight} for name, weight in weights.items()]
    data = {"format_version": FORMAT_VERSION, "sources": sources}
    with new_file(folder / MIXTURE_FILE) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def index_hashes(folder: Path) -> dict[str, str]:
    """Return a hash of each file that describes a mixture or token shards, by words for messages.

    Raises UserError or OSError.
    """
    names = list(read_weights(folder))
    mixture = [folder / MIXTURE_FILE] if names != [""] else []
    files = [*mixture, *(folder / name / INDEX_FILE for name in names)]
    hashes = {file: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}
    return {f"the hash of {file}": found for file, found in hashes.items()}


def first_index(folder: str | Path) -> Index:
    """Return the index of the first source, which has the vocabulary of all. Raises UserError."""
    return Index.load(Path(folder) / next(iter(read_weights(Path(folder)))))


def check_conversations(sources: Sequence[Source], seq_len: int, packing: str) -> None:
    """Raise UserError if rows of conversations, which are packed already, would be divided."""
    for source in sources:
        row_tokens = source.train.index.chat_seq_len
        if row_tokens not in (0, seq_len):
            allowed = f"{row_tokens}, the length of the rows into which the conversations"
            raise UserError("data.seq_len", seq_len, f"{allowed}{source.label} were packed")
        if row_tokens and packing != "cut":
            fix = "leave it out: conversations were packed by stu-prepare"
            raise UserError("data.packing", packing, fix=fix)


def fingerprint(sources: Sequence[Source]) -> str:
    """Return a hash of the contents of all sources, whatever their order."""
    prints = sorted((source.name, source.train.fingerprint()) for source in sources)
    if len(prints) == 1:
        return prints[0][1]
    return hashlib.sha256(json.dumps(prints).encode()).hexdigest()
