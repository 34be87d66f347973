"""A pass over the text of a corpus, and the one that writes its tokens."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from stu.common.processes import num_processors
from stu.tokenizer import Tokenizer
from train.data.config import PrepareConfig
from train.data.documents import Document, read_documents
from train.data.encode import Encoder, encode_all, token_dtype
from train.data.shards import Index, SplitWriter
from train.data.skipped import Skipped, require_mostly_good
from train.data.sources import Files

EXPECTED_DOCUMENTS = 5
"""Documents that an empty split may expect from the share that is advised for it."""
FEW_TOKENS = 10_000
"""A split of fewer is warned about."""
LARGEST_SHARE = 0.2
"""Largest share of all text that is advised for validation."""
LOG_SECONDS = 30
"""Between lines of progress where there is no terminal."""


class ByteProgress:
    """A bar on a terminal; elsewhere, in a job's log for one, a line now and then."""

    def __init__(self, progress: Progress, task: str, total: int) -> None:
        self._progress, self._task, self._total = progress, task, total
        self._bar = progress.add_task(task, total=total)
        self._done, self._start = 0, time.monotonic()
        self._told = self._start

    def advance(self, num_bytes: int) -> None:
        """Count bytes of the sources."""
        self._done += num_bytes
        self._progress.advance(self._bar, num_bytes)
        now = time.monotonic()
        if self._progress.console.is_terminal or now - self._told < LOG_SECONDS:
            return
        self._told, rate = now, self._done / (now - self._start)
        left = timedelta(seconds=round((self._total - self._done) / max(rate, 1)))
        print(
            f"{self._task}: {self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB, "
            f"{rate / 1e6:,.1f} MB/s, {left} left",
            file=sys.stderr,
            flush=True,
        )

    def finish(self) -> None:
        """Show all as done: what could not be read included."""
        self._progress.update(self._bar, completed=self._total)


def read_texts(
    config: PrepareConfig, files: Files, progress: Progress, task: str, skipped: Skipped
) -> Iterator[Document]:
    """Every document; the text of one that is only white space is "". Counts in `skipped` what
    cannot be read, unless the first of it is to end all: then raises BadInput.

    Raises ValueError if most of it is so.
    """
    bar = ByteProgress(progress, task, sum(path.stat().st_size for path in files.documents))
    on_bad = skipped.add if config.on_error == "skip" else None
    num_read = 0
    for document in read_documents(files.documents, config.text_key, files.piece_bytes, on_bad):
        bar.advance(document.source_bytes)
        num_read += 1
        # White space between pieces of a file is part of the file.
        is_empty = document.text.isspace() and document.starts and document.ends
        yield document._replace(text="") if is_empty else document
    bar.finish()
    if config.part is None:  # else all parts together are looked at
        require_mostly_good(num_read, skipped.counts, "; ".join(map(str, skipped.listed[:3])))


def write_splits(
    config: PrepareConfig, files: Files, tokenizer: Tokenizer, folder: Path, progress: Progress
) -> Index:
    """The shards of both splits of `files` in `folder`, either of which may be empty.

    Returns the index, which is not saved. Raises ValueError, OSError or BrokenProcessPool.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    encoder = Encoder(tokenizer.path, config.seed, config.validation_fraction)
    num_empty, skipped = 0, Skipped()

    def documents() -> Iterator[Document]:
        nonlocal num_empty
        for document in read_texts(config, files, progress, "tokenizing", skipped):
            if document.text:
                yield document
            else:
                num_empty += 1

    with (
        SplitWriter(folder, "train", dtype, config.shard_tokens) as train,
        SplitWriter(folder, "validation", dtype, config.shard_tokens) as validation,
        closing(encode_all(documents(), encoder, config.workers or num_processors())) as encoded,
    ):
        writers = {"train": train, "validation": validation}
        before = None  # where the piece went that this one goes on from
        for its in encoded:
            # BOS where the split has not what comes before, EOS at a file's true end alone.
            starts = its.starts or its.split != before
            tokens = its.tokens[0 if starts else 1 : None if its.ends else -1]
            writers[its.split].add(tokens, its.num_bytes, starts)
            before = None if its.ends else its.split
        splits = {name: writer.finish() for name, writer in writers.items()}
    skipped.save(folder)
    return Index(
        dtype=dtype.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        seed=config.seed,
        validation_fraction=config.validation_fraction,
        sources=list(config.sources),
        num_skipped_files=len(files.skipped),
        num_empty_documents=num_empty,
        splits=splits,
        num_hidden_files=files.num_hidden,
        num_repeated_files=files.num_repeated,
        num_bad_rows=dict(skipped.counts),
    )


def require_both_splits(config: PrepareConfig, num_documents: Mapping[str, int]) -> None:
    """Raises ValueError if a split, of those by name, has no documents."""
    train, validation = num_documents["train"], num_documents["validation"]
    if not train + validation:
        raise ValueError(f"no text in {', '.join(config.sources)}: every document is empty")
    if not train or not validation:
        empty, total = "validation" if train else "train", train + validation
        if total == 1:
            fix = "one document cannot be on both sides; give more, or the text as a .txt file"
        else:
            share = min(0.5, EXPECTED_DOCUMENTS / total)
            fix = f"raise it to {share:.2g}" if train else f"lower it to {1 - share:.2g}"
            fix += ", try another seed, or give more documents"
        raise ValueError(
            f"the {empty} split got none of {total} documents at validation_fraction "
            f"{config.validation_fraction}: {fix}"
        )


def warnings(index: Index) -> list[str]:
    """Return warnings about splits that are too small to be of use."""
    found = []
    validation, train = index.splits["validation"], index.splits["train"]
    if validation.num_tokens < FEW_TOKENS:
        # Twice what is expected to do, as the split is chosen by chance.
        share = 2 * FEW_TOKENS / (validation.num_tokens + train.num_tokens)
        fix = f"raise --validation-fraction to {max(share, index.validation_fraction):.2g}"
        if share > LARGEST_SHARE:
            fix = "give more text"
        found.append(
            f"the validation split has only {validation.num_tokens:,} tokens, too few for its loss "
            f"to tell models apart: {fix}"
        )
    if train.num_tokens < FEW_TOKENS:
        found.append(
            f"the train split has only {train.num_tokens:,} tokens: data.seq_len must be below "
            "that, and a step that reads more repeats them; give more text"
        )
    return found


def progress_bar() -> Progress:
    """One for the bytes of the sources."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
