"""Turn a list of sources into a mixture: token shards of each, all by one tokenizer."""

import dataclasses
import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from stu.common.errors import UserError
from stu.common.files import new_directory
from train.data.config import PrepareConfig
from train.data.corpus import require_both_splits, write_splits
from train.data.lock_file import LockFile
from train.data.mixture import MIXTURE_FILE, save_mixture
from train.data.parts import COMMON_FILE, require_same
from train.data.prepare import prepare_part, remove_unfinished
from train.data.reading.sources import find_files
from train.data.shards import INDEX_FILE
from train.data.source_list import SourceConfig, named, read_source_list
from train.data.tokenizer import Corpus, given_tokenizer, write_tokenizer


def prepare_mixture(config: PrepareConfig) -> None:
    """Tokenize the sources of a list into a mixture (see `train.data.mixture`) in `config.output`.

    Raises UserError, which names the source, or OSError, and then leaves nothing behind.
    """
    sources = read_source_list(config)
    corpora = _find(sources)
    with new_directory(config.output) as folder:
        tokenizer = write_tokenizer(config, corpora, folder)
        for source, (_, files, _) in zip(sources, corpora, strict=True):
            with named(source), new_directory(folder / source.name) as inside:
                tokenizer.save(inside)
                task = f"tokenizing {source.name}"
                index = write_splits(source, files, tokenizer, inside, task)
                require_both_splits(source, index.num_documents)
                index.save(inside)
        save_mixture(folder, {source.name: source.weight for source in sources})


def prepare_mixture_part(config: PrepareConfig) -> list[int]:
    """Make one part (`config.part`) of each source, and complete the mixture with the last one.

    Each source is as `prepare_part` makes it, and an interruption leaves its complete parts.
    Returns the parts that are still missing. Raises UserError, OSError, or BrokenProcessPool.
    """
    sources = read_source_list(config)
    output = config.output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    missing = set[int]()
    with closing(LockFile(output.with_name(f"{output.name}.lock"))) as lock:
        with lock.held(0):
            _start(config, sources, output)
        for source in sources:
            with named(source):
                made = dataclasses.replace(source, output=output / source.name, tokenizer=output)
                missing.update(prepare_part(made))
        with lock.held(0):
            # Other runs may have completed sources since this one made its part of them.
            if not all((output / source.name / INDEX_FILE).exists() for source in sources):
                return sorted(missing)
            if not (output / MIXTURE_FILE).exists():
                save_mixture(output, {source.name: source.weight for source in sources})
            return []


def _find(sources: Sequence[SourceConfig]) -> list[Corpus]:
    total = sum(source.weight for source in sources)
    corpora = []
    for source in sources:
        with named(source):
            files = find_files(source.sources, source.kind, source.allow_hub)
            corpora.append(Corpus(source, files, source.weight / total))
    return corpora


def _start(config: PrepareConfig, sources: Sequence[SourceConfig], output: Path) -> None:
    """Make the folder of the mixture with its tokenizer, unless another run has made it."""
    common = _common_settings(config, sources)
    if output.is_dir() and any(output.iterdir()):
        if not (output / COMMON_FILE).is_file():
            raise UserError("output", str(output), "new or empty", "choose another, or delete it")
        require_same(output, common)
        return
    remove_unfinished(output)
    with new_directory(output) as folder:
        write_tokenizer(config, _find(sources), folder)
        text = json.dumps(common, indent=2, ensure_ascii=False)
        own = text.encode(errors="backslashreplace")  # names of files may not be UTF-8
        (folder / COMMON_FILE).write_bytes(own + b"\n")


def _common_settings(config: PrepareConfig, sources: Sequence[SourceConfig]) -> dict[str, Any]:
    """Return what must be the same for all parts besides the settings of each source."""
    tokenizer = given_tokenizer(config)
    return {
        "sources": {source.name: source.weight for source in sources},
        "tokenizer": tokenizer.sha256 if tokenizer else f"trained {config.tokenizer}",
        "vocab_size": tokenizer.vocab_size if tokenizer else config.vocab_size,
    }
