"""`stu-prepare`: text in, token shards out."""

import heapq
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
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

from stu.arguments import ArgumentParser, run_command
from stu.atomic import new_directory
from stu.tokenizer import Tokenizer, train_bpe
from train.encode import Encoder, encode_all, split_of, text_hash, token_dtype
from train.shards import TOKENIZER_FILE, Index, SplitWriter
from train.sources import Files, find_files, read_documents

TOKENIZER_SAMPLE_BYTES = 64 << 20  # of training text; the trainer needs many times that in memory


@dataclass(frozen=True)
class PrepareConfig:
    """What `stu-prepare` reads, makes and writes."""

    sources: Sequence[str]
    """Files, folders, globs, or `stdlib:`."""
    output: Path
    """Folder to make; it must not exist, or be empty."""
    vocab_size: int = 4096
    """Tokens of the tokenizer to train; unused if `tokenizer` is given."""
    tokenizer: Path | None = None
    """SentencePiece model to use instead, or a folder with a `tokenizer.model`."""
    validation_fraction: float = 0.01
    """Chance of each document to go to the validation split."""
    shard_tokens: int = 100_000_000
    """Most tokens in one file, unless one document has more."""
    workers: int = 0
    """Processes that tokenize; 0: one for each CPU. The result does not depend on it."""
    seed: int = 0
    """Decides the split, and which documents the tokenizer learns from."""
    text_key: str = "text"
    """JSON field or Parquet column that holds the text."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: name at least one file, folder or glob, or stdlib:")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction {self.validation_fraction}: must be between 0 and 1"
            )
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size {self.vocab_size}: must be at least 1")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens {self.shard_tokens}: must be at least 1")
        if self.workers < 0:
            raise ValueError(f"workers {self.workers}: must be at least 1, or 0 for one per CPU")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: must be between 0 and 2**63 - 1")


def prepare(config: PrepareConfig) -> Index:
    """Tokenize `config.sources` into token shards (see `train.shards`) in `config.output`.

    Documents are split by a hash of their text and the seed, so equal documents fall on the same
    side; empty ones are dropped. The same sources and settings give the same bytes.

    Raises ValueError or OSError, and then leaves nothing behind.
    """
    files = find_files(config.sources)
    with new_directory(config.output) as folder, _progress_bar() as progress:
        if config.tokenizer is not None:
            tokenizer = _copy_tokenizer(config.tokenizer, folder)
        else:
            tokenizer = _train_tokenizer(config, files, folder, progress)
        index = _write_splits(config, files, tokenizer, folder, progress)
        index.save(folder)
    return index


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 when done, 2 after an error, which leaves nothing behind."""

    def write_shards() -> int:
        config = _parse(argv)
        try:
            index = prepare(config)
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process died, perhaps for want of memory; lower --workers"
            ) from error
        print(_summary(index, config.output))
        return 0

    return run_command("stu-prepare", write_shards)


def _copy_tokenizer(path: Path, folder: Path) -> Tokenizer:
    given = Tokenizer(path / TOKENIZER_FILE if path.is_dir() else path)
    if min(given.bos_id, given.eos_id) < 0:
        raise ValueError(f"tokenizer {path}: has no BOS or no EOS to mark documents with")
    copy = folder / TOKENIZER_FILE
    copy.write_bytes(given.model_bytes)
    return Tokenizer(copy)


def _train_tokenizer(
    config: PrepareConfig, files: Files, folder: Path, progress: Progress
) -> Tokenizer:
    """Train on the training documents with the smallest hashes, as many as the sample holds."""
    sample: list[tuple[float, str]] = []  # a heap, the largest hash first
    sample_bytes = 0
    num_documents = Counter[str]()
    for text in _read(config, files, progress, "choosing text"):
        split = split_of(text, config.seed, config.validation_fraction) if text else "empty"
        num_documents[split] += 1
        if split != "train":
            continue
        start = text[:TOKENIZER_SAMPLE_BYTES]
        heapq.heappush(sample, (-text_hash(text, config.seed), start))
        sample_bytes += len(start.encode())
        while sample_bytes > TOKENIZER_SAMPLE_BYTES and len(sample) > 1:
            sample_bytes -= len(heapq.heappop(sample)[1].encode())
    _require_both_splits(config, num_documents)
    progress.console.print("training the tokenizer")
    return train_bpe((text for _, text in sample), config.vocab_size, folder / TOKENIZER_FILE)


def _write_splits(
    config: PrepareConfig, files: Files, tokenizer: Tokenizer, folder: Path, progress: Progress
) -> Index:
    dtype = token_dtype(tokenizer.vocab_size)
    encoder = Encoder(tokenizer.path, config.seed, config.validation_fraction)
    num_empty = 0

    def texts() -> Iterator[str]:
        nonlocal num_empty
        for text in _read(config, files, progress, "tokenizing"):
            if text:
                yield text
            else:
                num_empty += 1

    with (
        SplitWriter(folder, "train", dtype, config.shard_tokens) as train,
        SplitWriter(folder, "validation", dtype, config.shard_tokens) as validation,
        closing(encode_all(texts(), encoder, config.workers or _num_cpus())) as documents,
    ):
        writers = {"train": train, "validation": validation}
        for document in documents:
            writers[document.split].add(document.tokens, document.num_bytes)
        splits = {name: writer.finish() for name, writer in writers.items()}
    _require_both_splits(config, {name: split.num_documents for name, split in splits.items()})
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


def _read(config: PrepareConfig, files: Files, progress: Progress, task: str) -> Iterator[str]:
    """The text of every document, "" for one that is empty or only white space."""
    total = sum(path.stat().st_size for path in files.documents)
    bar = progress.add_task(task, total=total)
    for document in read_documents(files.documents, config.text_key):
        progress.advance(bar, document.source_bytes)
        yield "" if document.text.isspace() else document.text


def _require_both_splits(config: PrepareConfig, num_documents: Mapping[str, int]) -> None:
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


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _num_cpus() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))  # a job may own fewer than the machine has
    return os.cpu_count() or 1


def _parse(arguments: Sequence[str] | None) -> PrepareConfig:
    parser = ArgumentParser(
        prog="stu-prepare",
        description="Tokenize text into shards that stu-train reads. Sources: .txt (one document "
        "each), .jsonl, .jsonl.gz and .parquet (one document a row); a folder or glob of them; or "
        "stdlib:, the sources of this Python's standard library.",
    )
    default = PrepareConfig(sources=["stdlib:"], output=Path())
    add = parser.add_argument
    add("sources", metavar="SOURCE", nargs="+", help="file, folder, glob or stdlib:")
    add("--config", action="config", help="YAML file with any of these settings")
    add("--output", metavar="DIR", type=Path, required=True, help="new folder to write")
    add("--vocab-size", type=int, default=default.vocab_size, help="of the tokenizer to train")
    add(
        "--tokenizer", metavar="PATH", type=Path, help="use this .model or model folder, train none"
    )
    add(
        "--validation-fraction",
        type=float,
        default=default.validation_fraction,
        help="chance of each document to be held out",
    )
    add("--shard-tokens", type=int, default=default.shard_tokens, help="most tokens in a file")
    add("--workers", type=int, default=default.workers, help="processes; 0: one for each CPU")
    add("--seed", type=int, default=default.seed, help="decides the split")
    add("--text-key", default=default.text_key, help="JSON field or Parquet column of the text")
    given = parser.parse_args(arguments).as_dict()
    del given["config"]
    return PrepareConfig(**given)


def _summary(index: Index, output: Path) -> str:
    lines = [
        f"{name}: {split.num_documents:,} documents, {split.num_bytes / 1e6:,.1f} MB, "
        f"{split.num_tokens:,} tokens ({split.num_bytes / split.num_tokens:.2f} bytes per token)"
        for name, split in index.splits.items()
    ]
    left_out = f"left out: {index.num_empty_documents:,} empty documents"
    if index.num_skipped_files:
        left_out += f", {index.num_skipped_files:,} files of another kind"
    return "\n".join([*lines, left_out, f"wrote {output}"])


if __name__ == "__main__":
    sys.exit(main())
