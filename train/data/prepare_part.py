"""`stu-prepare --part i/n`: one part of a corpus, and the whole once every part is there."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

from stu.common.array_task import ArrayTask
from stu.common.files import new_directory
from stu.tokenizer import Tokenizer
from train.data.config import PrepareConfig
from train.data.corpus import progress_bar, require_both_splits, write_splits
from train.data.lock_file import LockFile
from train.data.parts import COMMON_FILE, Parts, require_same
from train.data.prepare import given_tokenizer, make_tokenizer
from train.data.shards import INDEX_FILE, TOKENIZER_FILE
from train.data.skipped import require_mostly_good
from train.data.sources import Files, find_files

ALL_PARTS = 0  # byte of the lock file: held to begin, and to put together; 1 + i: to make part i


def prepare_part(config: PrepareConfig) -> list[int]:
    """Make part i of n (`config.part`) unless it is there, and `config.output` if all parts are.

    The first that comes makes the tokenizer, and others wait for it. Returns the parts that are
    still missing. However it is interrupted, what is complete stays, and the same call goes on from
    there. The parts in order hold the tokens of `train.data.prepare.prepare` in their order.

    Raises ValueError, for one if there are parts made with other settings; OSError; or
    BrokenProcessPool if a worker dies.
    """
    assert config.part is not None
    task = ArrayTask.parse(config.part)
    number, count = task.index, task.count
    files = find_files(config.sources)
    common = _common(config, files, count)
    parts = Parts(config.output.resolve(), count)
    parts.output.parent.mkdir(parents=True, exist_ok=True)
    lock_path = parts.output.with_name(f"{parts.output.name}.lock")
    with LockFile(lock_path) as lock, lock.held(1 + number):
        with lock.held(ALL_PARTS):
            if _is_output_done(parts.output, common):
                return []
            _begin(config, files, common, parts.folder)
            if number not in parts.missing():
                return _put_together(config, parts)
        _make(config, files, number, parts)
        with lock.held(ALL_PARTS):
            return _put_together(config, parts)


def share(files: Sequence[Path], number: int, count: int) -> list[Path]:
    """Part `number` of `count`, each the files that follow those of the one before, and of about
    as many bytes: those whose middle falls into its part of the sum. It may be empty."""
    sizes = [path.stat().st_size for path in files]
    total = max(sum(sizes), 1)
    chosen, start = [], 0
    for path, size in zip(files, sizes, strict=True):
        twice_its_middle = 2 * start + size
        if min(twice_its_middle * count // (2 * total), count - 1) == number:
            chosen.append(path)
        start += size
    return chosen


def _common(config: PrepareConfig, files: Files, count: int) -> dict[str, Any]:
    """What decides the tokens, as JSON values by the names that errors give them."""
    sizes = [(str(path.absolute()), path.stat().st_size) for path in files.documents]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    total = sum(size for _, size in sizes)
    given = given_tokenizer(config.tokenizer) if config.tokenizer else None
    return {
        "number of parts": count,
        "sources": f"{len(sizes)} files of {total} bytes, their names and sizes {digest[:16]}",
        "tokenizer": given.sha256 if given else "trained",
        "vocab_size": given.vocab_size if given else config.vocab_size,
        "validation_fraction": config.validation_fraction,
        "shard_tokens": config.shard_tokens,
        "seed": config.seed,
        "text_key": config.text_key,
        "on_error": config.on_error,
    }


def _is_output_done(output: Path, common: dict[str, Any]) -> bool:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / COMMON_FILE).is_file():
        raise ValueError(f"output {output}: exists and is not empty; choose another, or delete it")
    require_same(output, common)
    return True


def _begin(config: PrepareConfig, files: Files, common: dict[str, Any], folder: Path) -> None:
    if folder.exists():
        require_same(folder, common)
        return
    _remove_unfinished(folder)
    with new_directory(folder) as temporary, progress_bar() as progress:
        make_tokenizer(config, files, temporary, progress)
        text = json.dumps(common, indent=2, ensure_ascii=False)
        (temporary / COMMON_FILE).write_text(text + "\n", encoding="utf-8")


def _make(config: PrepareConfig, files: Files, number: int, parts: Parts) -> None:
    path = parts.path(number)
    _remove_unfinished(path)
    its_files = files._replace(documents=share(files.documents, number, parts.count))
    tokenizer = Tokenizer(parts.folder / TOKENIZER_FILE)
    with new_directory(path) as temporary, progress_bar() as progress:
        write_splits(config, its_files, tokenizer, temporary, progress).save(temporary)


def _remove_unfinished(path: Path) -> None:
    """What is left of processes that were killed: the lock tells that no other makes `path`."""
    for left in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        shutil.rmtree(left)


def _put_together(config: PrepareConfig, parts: Parts) -> list[int]:
    """The parts still missing; the output is made if there are none."""
    missing = parts.missing()
    if missing:
        return missing
    if not (parts.folder / INDEX_FILE).exists():
        index = parts.index()
        require_mostly_good(index.num_read, index.num_bad_rows, parts.folder)
        require_both_splits(config, index.num_documents)
        parts.collect(index)
    parts.rename()
    return []
