"""Turn text into token shards: a whole corpus in one run, or one part in each of several runs."""

import hashlib
import json
import shutil
from contextlib import closing
from glob import escape
from pathlib import Path
from typing import Any

from stu.common.array_task import ArrayTask
from stu.common.errors import UserError
from stu.common.files import new_directory, require_no_mount
from stu.tokenizer import read_tokenizer
from train.data.config import TRAINED, PrepareConfig
from train.data.corpus import require_both_splits, write_splits
from train.data.lock_file import LockFile
from train.data.parts import COMMON_FILE, Parts, files_of_part, require_same
from train.data.reading.remote import full_name, size_of
from train.data.reading.skipped import require_mostly_good
from train.data.reading.sources import Files, find_files
from train.data.shards import INDEX_FILE, Index
from train.data.tokenizer import Corpus, given_tokenizer, write_tokenizer

ALL_PARTS = 0
"""Byte of the lock file that is locked to start or to join the parts; byte 1 + i is for part i."""


def prepare(config: PrepareConfig) -> Index:
    """Tokenize `config.sources` into token shards (see `train.data.shards`) in `config.output`.

    Documents are split by a hash of their text and the seed, so equal documents go to the same
    split; empty ones are dropped. The same sources and settings give the same bytes.

    Raises UserError or OSError, and then leaves nothing behind.
    """
    files = find_files(config.sources, config.kind, config.allow_hub)
    with new_directory(config.output) as folder:
        tokenizer = write_tokenizer(config, [Corpus(config, files)], folder)
        index = write_splits(config, files, tokenizer, folder)
        require_both_splits(config, index.num_documents)
        index.save(folder)
    return index


def prepare_part(config: PrepareConfig) -> list[int]:
    """Make one part (`config.part`) of the token shards, and join all parts once they exist.

    The first run makes the tokenizer while others wait for it. The joined parts hold the same
    tokens in the same order as `prepare` writes them. A run that is interrupted in any way leaves
    complete parts in place; the same call continues from there.

    Returns the parts that are still missing. Raises UserError, among others if parts exist that
    were made with other settings, OSError, or BrokenProcessPool if a worker dies.
    """
    assert config.part is not None
    task = ArrayTask.parse(config.part)
    files = find_files(config.sources, config.kind, config.allow_hub)
    common = _common_settings(config, files, task.count)
    parts = Parts(config.output.resolve(), task.count)
    require_no_mount(parts.output)
    parts.output.parent.mkdir(parents=True, exist_ok=True)
    lock_path = parts.output.with_name(f"{parts.output.name}.lock")
    with closing(LockFile(lock_path)) as lock, lock.held(1 + task.index):
        with lock.held(ALL_PARTS):
            if _is_output_complete(parts.output, common):
                return []
            _start(config, files, common, parts.folder)
            if task.index not in parts.missing():
                return _join(config, parts)
        _write_part(config, files, task.index, parts)
        with lock.held(ALL_PARTS):
            return _join(config, parts)


def _common_settings(config: PrepareConfig, files: Files, count: int) -> dict[str, Any]:
    """Return what decides the tokens, and so must be the same for all parts, as JSON values."""
    sizes = [(full_name(path), size_of(path)) for path in files.documents]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    total = sum(size for _, size in sizes)
    tokenizer = given_tokenizer(config)
    trained = "trained" if config.tokenizer == TRAINED[0] else f"trained {config.tokenizer}"
    return {
        "number of parts": count,
        "sources": f"{len(sizes)} files of {total} bytes, their names and sizes {digest[:16]}",
        "tokenizer": tokenizer.sha256 if tokenizer else trained,
        "vocab_size": tokenizer.vocab_size if tokenizer else config.vocab_size,
        "validation_fraction": config.validation_fraction,
        "shard_tokens": config.shard_tokens,
        "seed": config.seed,
        "text_key": config.text_key,
        "kind": config.kind,
        "on_error": config.on_error,
    }


def _is_output_complete(output: Path, common: dict[str, Any]) -> bool:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / COMMON_FILE).is_file():
        raise UserError("output", str(output), "new or empty", "choose another, or delete it")
    require_same(output, common)
    return True


def _start(config: PrepareConfig, files: Files, common: dict[str, Any], folder: Path) -> None:
    """Make the folder of the parts with the tokenizer, unless another run has made it."""
    if folder.exists():
        require_same(folder, common)
        return
    remove_unfinished(folder)
    with new_directory(folder) as temporary:
        write_tokenizer(config, [Corpus(config, files)], temporary)
        text = json.dumps(common, indent=2, ensure_ascii=False)
        own = text.encode(errors="backslashreplace")  # names of files may not be UTF-8
        (temporary / COMMON_FILE).write_bytes(own + b"\n")


def _write_part(config: PrepareConfig, files: Files, number: int, parts: Parts) -> None:
    path = parts.path(number)
    remove_unfinished(path)
    chosen = files._replace(documents=files_of_part(files.documents, number, parts.count))
    tokenizer = read_tokenizer(parts.folder)
    with new_directory(path) as temporary:
        write_splits(config, chosen, tokenizer, temporary).save(temporary)


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes left. The lock ensures that no other process makes `path`."""
    for leftover in path.parent.glob(f".{escape(path.name)}.{8 * '[0-9a-f]'}.tmp"):
        shutil.rmtree(leftover)


def _join(config: PrepareConfig, parts: Parts) -> list[int]:
    """Make the output if all parts exist. Returns the missing parts."""
    if missing := parts.missing():
        return missing
    if not (parts.folder / INDEX_FILE).exists():
        index = parts.index()
        require_mostly_good(index.num_read, index.num_bad_rows, parts.folder)
        require_both_splits(config, index.num_documents)
        parts.collect(index)
    parts.rename()
    return []
