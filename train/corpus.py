"""A pass over the text of a corpus, and the one that writes its tokens."""

from collections.abc import Iterator, Mapping
from contextlib import closing
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

from stu.processors import num_processors
from stu.tokenizer import Tokenizer
from train.encode import Encoder, encode_all, token_dtype
from train.prepare_config import PrepareConfig
from train.shards import Index, SplitWriter
from train.sources import Files, read_documents


def read_texts(config: PrepareConfig, files: Files, progress: Progress, task: str) -> Iterator[str]:
    """The text of every document, "" for one that is empty or only white space."""
    total = sum(path.stat().st_size for path in files.documents)
    bar = progress.add_task(task, total=total)
    for document in read_documents(files.documents, config.text_key):
        progress.advance(bar, document.source_bytes)
        yield "" if document.text.isspace() else document.text


def write_splits(
    config: PrepareConfig, files: Files, tokenizer: Tokenizer, folder: Path, progress: Progress
) -> Index:
    """The shards of both splits of `files` in `folder`, either of which may be empty.

    Returns the index, which is not saved. Raises ValueError, OSError or BrokenProcessPool.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    encoder = Encoder(tokenizer.path, config.seed, config.validation_fraction)
    num_empty = 0

    def texts() -> Iterator[str]:
        nonlocal num_empty
        for text in read_texts(config, files, progress, "tokenizing"):
            if text:
                yield text
            else:
                num_empty += 1

    with (
        SplitWriter(folder, "train", dtype, config.shard_tokens) as train,
        SplitWriter(folder, "validation", dtype, config.shard_tokens) as validation,
        closing(encode_all(texts(), encoder, config.workers or num_processors())) as documents,
    ):
        writers = {"train": train, "validation": validation}
        for document in documents:
            writers[document.split].add(document.tokens, document.num_bytes)
        splits = {name: writer.finish() for name, writer in writers.items()}
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
    )


def require_both_splits(config: PrepareConfig, num_documents: Mapping[str, int]) -> None:
    """Raises ValueError if a split, of those by name, has no documents."""
    train, validation = num_documents["train"], num_documents["validation"]
    if not train + validation:
        raise ValueError(f"no text in {', '.join(config.sources)}: every document is empty")
    if not train or not validation:
        empty = "validation" if train else "train"
        raise ValueError(
            f"the {empty} split got none of {train + validation} documents at validation_fraction "
            f"{config.validation_fraction}: {'raise' if train else 'lower'} it, try another seed, "
            f"or give more documents (one .txt file is one document)"
        )


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
