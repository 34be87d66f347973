"""Token shards that were made in parts, on the way to one folder of them.

```
DIR.parts/parts.json      what all parts have in common
DIR.parts/tokenizer.model
DIR.parts/0-of-8/         index and token files of part 0: all of them, or none
DIR/                      once all parts were there: DIR.parts, renamed
```
"""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stu.common.files import fsync
from train.data.shards import INDEX_FILE, Index, Split, shard_file
from train.data.skipped import SKIPPED_FILE, join_skipped

COMMON_FILE = "parts.json"


@dataclasses.dataclass(frozen=True)
class Parts:
    """`count` parts of the token shards that will be `output`."""

    output: Path
    count: int

    @property
    def folder(self) -> Path:
        """Where they are until they are put together."""
        return self.output.with_name(f"{self.output.name}.parts")

    def path(self, number: int) -> Path:
        """The folder of one part."""
        return self.folder / f"{number}-of-{self.count}"

    def missing(self) -> list[int]:
        """Those that are yet to be made."""
        if (self.folder / INDEX_FILE).exists():
            return []  # `rename` was interrupted when it may have removed some
        return [number for number in range(self.count) if not self.path(number).exists()]

    def index(self) -> Index:
        """Of all parts, in order. Raises ValueError unless they are there."""
        parts = [Index.load(self.path(number)) for number in range(self.count)]
        splits = {}
        for name in parts[0].splits:
            of_parts = [part.splits[name] for part in parts]
            shards = [shard for split in of_parts for shard in split.shards]
            splits[name] = Split(
                num_tokens=sum(split.num_tokens for split in of_parts),
                num_documents=sum(split.num_documents for split in of_parts),
                num_bytes=sum(split.num_bytes for split in of_parts),
                shards=[
                    dataclasses.replace(shard, file=shard_file(name, number))
                    for number, shard in enumerate(shards)
                ],
            )
        num_empty = sum(part.num_empty_documents for part in parts)
        num_bad = sum((Counter(part.num_bad_rows) for part in parts), Counter[str]())
        return dataclasses.replace(
            parts[0], num_empty_documents=num_empty, splits=splits, num_bad_rows=dict(num_bad)
        )

    def collect(self, index: Index) -> None:
        """Move the token files of all parts to where `index` (`self.index()`) has them, and save
        it. After an interruption it can be called again.

        Raises ValueError if a token file is missing.
        """
        for name, split in index.splits.items():
            sources = [
                self.path(number) / shard.file
                for number in range(self.count)
                for shard in Index.load(self.path(number)).splits[name].shards
            ]
            for source, shard in zip(sources, split.shards, strict=True):
                _move(source, self.folder / shard.file)
        lists = [self.path(number) / SKIPPED_FILE for number in range(self.count)]
        join_skipped([path for path in lists if path.exists()], self.folder / SKIPPED_FILE)
        fsync(self.folder)
        index.save(self.folder)

    def rename(self) -> None:
        """Make what was collected the output. After an interruption it can be called again."""
        for inside in list(self.folder.iterdir()):
            if inside.is_dir():
                shutil.rmtree(inside)
            elif inside.suffix == ".tmp":  # of a process that was killed
                inside.unlink()
        self.folder.replace(self.output)
        fsync(self.output.parent)


def require_same(folder: Path, common: Mapping[str, Any]) -> None:
    """Raises ValueError naming what `folder` was made with if it is not `common`."""
    there = json.loads((folder / COMMON_FILE).read_text(encoding="utf-8"))
    for name, value in common.items():
        if there.get(name) != value:
            raise ValueError(
                f"{name} {value}: {folder} was made with {there.get(name)}; give that, choose "
                "another output, or delete the folder"
            )


def _move(source: Path, target: Path) -> None:
    if source.exists():
        source.replace(target)
    elif not target.exists():  # nor did a call that was interrupted move it
        raise ValueError(f"{source}: no such file; delete its folder, and make that part again")
