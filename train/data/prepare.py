"""`stu-prepare`: text in, token shards out."""

import heapq
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.progress import Progress

from stu.common.cli import ArgumentParser, run_command
from stu.common.files import new_directory
from stu.tokenizer import Tokenizer, train_bpe
from train.data.config import PrepareConfig
from train.data.corpus import (
    progress_bar,
    read_texts,
    require_both_splits,
    warnings,
    write_splits,
)
from train.data.encode import split_of, text_hash
from train.data.shards import TOKENIZER_FILE, Index
from train.data.skipped import SKIPPED_FILE, Skipped
from train.data.sources import Files, find_files

TOKENIZER_SAMPLE_BYTES = 64 << 20  # of training text; the trainer needs many times that in memory


def prepare(config: PrepareConfig) -> Index:
    """Tokenize `config.sources` into token shards (see `train.data.shards`) in `config.output`; for
    a part of them see `train.data.prepare_part`.

    Documents are split by a hash of their text and the seed, so equal documents fall on the same
    side; empty ones are dropped. The same sources and settings give the same bytes.

    Raises ValueError or OSError, and then leaves nothing behind.
    """
    assert config.part is None
    files = find_files(config.sources)
    with new_directory(config.output) as folder, progress_bar() as progress:
        tokenizer = make_tokenizer(config, files, folder, progress)
        index = write_splits(config, files, tokenizer, folder, progress)
        require_both_splits(config, index.num_documents)
        index.save(folder)
    return index


def make_tokenizer(
    config: PrepareConfig, files: Files, folder: Path, progress: Progress
) -> Tokenizer:
    """`tokenizer.model` in `folder`: the given one, or one trained on the documents of `files`.

    Raises ValueError or OSError.
    """
    if config.tokenizer is None:
        return _train_tokenizer(config, files, folder, progress)
    copy = folder / TOKENIZER_FILE
    copy.write_bytes(given_tokenizer(config.tokenizer).model_bytes)
    return Tokenizer(copy)


def given_tokenizer(path: Path) -> Tokenizer:
    """That of a file, or of a folder with one. Raises ValueError if it marks no documents."""
    given = Tokenizer(path / TOKENIZER_FILE if path.is_dir() else path)
    if min(given.bos_id, given.eos_id) < 0:
        raise ValueError(f"tokenizer {path}: has no BOS or no EOS to mark documents with")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 when done, 2 after an error, which leaves nothing behind."""

    def write_shards() -> int:
        config = _parse(argv)
        try:
            print(_part(config) if config.part else _summary(prepare(config), config.output))
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process died, perhaps for want of memory; lower --workers"
            ) from error
        return 0

    return run_command("stu-prepare", write_shards, "train")


def _train_tokenizer(
    config: PrepareConfig, files: Files, folder: Path, progress: Progress
) -> Tokenizer:
    """Train on the training documents with the smallest hashes, as many as the sample holds."""
    sample: list[tuple[float, str]] = []  # a heap, the largest hash first
    sample_bytes = 0
    num_documents = Counter[str]()
    for document in read_texts(config, files, progress, "choosing text", Skipped()):
        text = document.text
        split = split_of(text, config.seed, config.validation_fraction) if text else "empty"
        num_documents[split] += 1
        if split != "train":
            continue
        start = text[:TOKENIZER_SAMPLE_BYTES]
        heapq.heappush(sample, (-text_hash(text, config.seed), start))
        sample_bytes += len(start.encode())
        while sample_bytes > TOKENIZER_SAMPLE_BYTES and len(sample) > 1:
            sample_bytes -= len(heapq.heappop(sample)[1].encode())
    require_both_splits(config, num_documents)
    progress.console.print("training the tokenizer")
    return train_bpe((text for _, text in sample), config.vocab_size, folder / TOKENIZER_FILE)


def _parse(arguments: Sequence[str] | None) -> PrepareConfig:
    parser = ArgumentParser(
        prog="stu-prepare",
        description="Tokenize text into shards that stu-train reads. Sources: .txt and .md (one "
        "document each), .jsonl, .csv and .parquet (one document a row), all but the last also "
        "compressed, as .gz or .zst; a folder or glob of them; or stdlib:, the sources of this "
        "Python's standard library.",
    )
    parser.add_argument(
        "sources", metavar="SOURCE", nargs="+", help="file, folder, glob or stdlib:"
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_settings(PrepareConfig)
    given = parser.parse_args(arguments).as_dict()
    del given["config"]
    return PrepareConfig(**given)


def _part(config: PrepareConfig) -> str:
    # Not above: it imports this module, and locks files as not every system can.
    from train.data.prepare_part import prepare_part

    missing = prepare_part(config)
    if missing:
        return f"part {config.part} is done; of the others {len(missing):,} are not yet"
    return _summary(Index.load(config.output), config.output)


def _summary(index: Index, output: Path) -> str:
    lines = [
        f"{name}: {split.num_documents:,} documents, {split.num_bytes / 1e6:,.1f} MB, "
        f"{split.num_tokens:,} tokens ({split.num_bytes / split.num_tokens:.2f} bytes per token)"
        for name, split in index.splits.items()
    ]
    num_bad = sum(index.num_bad_rows.values())
    total = index.num_read + num_bad
    left_out = f"left out: {index.num_empty_documents:,} empty documents"
    for count, what in [
        (index.num_skipped_files, "files of another kind"),
        (index.num_hidden_files, "hidden files and folders"),
        (index.num_repeated_files, "paths of files that were read by another"),
    ]:
        if count:
            left_out += f", {count:,} {what}"
    lines += [left_out]
    if num_bad:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in index.num_bad_rows.items())
        lines.append(f"could not be read: {num_bad:,} ({kinds}), see {output / SKIPPED_FILE}")
    num_tokens = sum(split.num_tokens for split in index.splits.values())
    lines.append(f"in all: {total:,} documents, {num_tokens:,} tokens")
    lines += [f"warning: {text}" for text in warnings(index)]
    return "\n".join([*lines, f"wrote {output}"])


if __name__ == "__main__":
    sys.exit(main())
