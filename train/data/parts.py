"""Parts of the token shards of one corpus, made by several runs and then joined in one folder.

```
DIR.parts/parts.json      settings that all parts have in common
DIR.parts/tokenizer.model    or the files of another tokenizer
DIR.parts/0-of-8/         index and token files of part 0; exists only once it is complete
DIR/                      DIR.parts, renamed once all parts exist
```
"""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stu.common.errors import UserError
from stu.common.files import fsync
from train.data.reading.remote import InputFile, size_of
from train.data.reading.skipped import SKIPPED_FILE, join_lists
from train.data.rows.starts import starts_file
from train.data.shards import INDEX_FILE, Index, Split, shard_file

COMMON_FILE = "parts.json"


@dataclasses.dataclass(frozen=True)
class Parts:
    """The `count` parts of the token shards that will be in the folder `output`."""

    output: Path
    count: int

    @property
    def folder(self) -> Path:
        """Folder of the parts until they are joined."""
        return self.output.with_name(f"{self.output.name}.parts")

    def path(self, number: int) -> Path:
        """Return the folder of one part."""
        return self.folder / f"{number}-of-{self.count}"

    def missing(self) -> list[int]:
        """Return the parts that do not exist yet."""
        if (self.folder / INDEX_FILE).exists():
            return []  # `rename` may have removed some before it was interrupted
        return [number for number in range(self.count) if not self.path(number).exists()]

    def index(self) -> Index:
        """Return the index of all parts, in order. Raises UserError if one does not exist."""
        parts = [Index.load(self.path(number)) for number in range(self.count)]
        num_bad = sum((Counter(part.num_bad_rows) for part in parts), Counter[str]())
        return dataclasses.replace(
            parts[0],
            num_empty_documents=sum(part.num_empty_documents for part in parts),
            splits={
                name: _joined(name, [part.splits[name] for part in parts])
                for name in parts[0].splits
            },
            num_bad_rows=dict(num_bad),
        )

    def collect(self, index: Index) -> None:
        """Move the token files of all parts to the names in `index` (`self.index()`), and save it.

        Can be called again after an interruption. Raises UserError if a token file is missing.
        """
        for name, split in index.splits.items():
            sources = [
                self.path(number) / shard.file
                for number in range(self.count)
                for shard in Index.load(self.path(number)).splits[name].shards
            ]
            for source, shard in zip(sources, split.shards, strict=True):
                if starts_file(source).exists():
                    _move(starts_file(source), starts_file(self.folder / shard.file))
                _move(source, self.folder / shard.file)
        lists = [self.path(number) / SKIPPED_FILE for number in range(self.count)]
        join_lists([path for path in lists if path.exists()], self.folder / SKIPPED_FILE)
        fsync(self.folder)
        index.save(self.folder)

    def rename(self) -> None:
        """Turn the collected folder into the output. Can be called again after an interruption."""
        for inside in list(self.folder.iterdir()):
            if inside.is_dir():
                shutil.rmtree(inside)
            elif inside.suffix == ".tmp":  # from a process that was killed
                inside.unlink()
        self.folder.replace(self.output)
        fsync(self.output.parent)


def files_of_part(files: Sequence[InputFile], number: int, count: int) -> list[InputFile]:
    """Return the files of one part of `count`, which may be none.

    Parts are consecutive and have about as many bytes each: a file belongs to the part in which
    its middle byte lies.
    """
    sizes = [size_of(path) for path in files]
    total = max(sum(sizes), 1)
    chosen, start = [], 0
    for path, size in zip(files, sizes, strict=True):
        twice_middle = 2 * start + size
        if min(twice_middle * count // (2 * total), count - 1) == number:
            chosen.append(path)
        start += size
    return chosen


def require_same(folder: Path, common: Mapping[str, Any]) -> None:
    """Raise UserError, naming the setting, unless `folder` was made with the settings `common`."""
    saved = json.loads((folder / COMMON_FILE).read_text(encoding="utf-8"))
    for name, value in common.items():
        if saved.get(name) != value:
            raise UserError(
                name,
                message=f"{name} {value}: {folder} was made with {saved.get(name)}; use that, "
                "choose another output, or delete the folder",
            )


def _joined(name: str, splits: Sequence[Split]) -> Split:
    shards = [shard for split in splits for shard in split.shards]
    return Split(
        num_tokens=sum(split.num_tokens for split in splits),
        num_documents=sum(split.num_documents for split in splits),
        num_bytes=sum(split.num_bytes for split in splits),
        shards=[
            dataclasses.replace(shard, file=shard_file(name, number))
            for number, shard in enumerate(shards)
        ],
    )


def _move(source: Path, target: Path) -> None:
    if source.exists():
        source.replace(target)
    elif not target.exists():  # an interrupted call has not moved it either
        raise UserError(
            str(source),
            message=f"{source}: no such file; delete its folder, and make that part again",
        )
