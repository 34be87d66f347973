"""`stu-prepare`: text in, token shards out."""

import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from stu.common.cli import ArgumentParser, run_command
from stu.common.errors import UserError
from train.data.config import PrepareConfig
from train.data.mixture import read_weights
from train.data.prepare import prepare, prepare_part
from train.data.prepare_mixture import prepare_mixture, prepare_mixture_part
from train.data.reading.skipped import SKIPPED_FILE
from train.data.shards import Index
from train.data.source_list import is_source_list

FEW_TOKENS = 10_000
"""Tokens in a split below which the user is warned."""
LARGEST_FRACTION = 0.2
"""Largest validation fraction that a warning suggests."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 after an error, which leaves nothing behind."""
    return run_command("stu-prepare", lambda: _run(_parse(argv)), "train", PrepareConfig)


def warnings(index: Index) -> list[str]:
    """Return warnings about splits that are too small to be of use."""
    found = []
    validation, train = index.splits["validation"], index.splits["train"]
    if index.validation_fraction > 0 and validation.num_tokens < FEW_TOKENS:
        # Twice the fraction that is expected to do, as documents are chosen at random.
        fraction = 2 * FEW_TOKENS / (validation.num_tokens + train.num_tokens)
        fix = f"raise --validation-fraction to {max(fraction, index.validation_fraction):.2g}"
        if fraction > LARGEST_FRACTION:
            fix = "give more text"
        found.append(
            f"the validation split has only {validation.num_tokens:,} tokens, too few for its loss "
            f"to tell models apart: {fix}"
        )
    if index.validation_fraction < 1 and train.num_tokens < FEW_TOKENS:
        found.append(
            f"the train split has only {train.num_tokens:,} tokens: data.seq_len must be less than "
            "that, and a step that reads more repeats them; give more text"
        )
    return found


def _parse(arguments: Sequence[str] | None) -> PrepareConfig:
    parser = ArgumentParser(
        prog="stu-prepare",
        description="Convert text to token shards for stu-train. A source is a file, a folder or a "
        "glob, a URL of these (s3://..), or stdlib: for the source code of Python's standard "
        "library. Files are .txt or .md (one document each), or .jsonl, .csv, .parquet or .arrow "
        "(one document per row); text, .jsonl and .csv may be compressed (.gz, .zst). A folder may "
        "also be a dataset saved by Hugging Face's datasets. A .yaml file lists sources with names "
        "and weights, to train on a mixture of them.",
    )
    parser.add_argument(
        "sources", metavar="SOURCE", nargs="+", help="File, folder, glob, URL or stdlib:"
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these settings.")
    parser.add_settings(PrepareConfig)
    values = parser.parse_args(arguments).as_dict()
    del values["config"]
    return PrepareConfig(**values)


def _run(config: PrepareConfig) -> int:
    is_mixture = is_source_list(config.sources)
    prepare_all, prepare_one = (
        (prepare_mixture, prepare_mixture_part) if is_mixture else (prepare, prepare_part)
    )
    try:
        if config.part and (missing := prepare_one(config)):
            print(f"part {config.part} is done; parts still missing: {len(missing):,}")
            return 0
        if not config.part:
            prepare_all(config)
    except BrokenProcessPool as error:
        message = "a worker process died, perhaps for lack of memory; lower --workers"
        raise UserError("workers", message=message) from error
    for name, weight in read_weights(config.output).items():
        if is_mixture:
            print(f"source {name}, weight {weight:g}")
        print(_summary(config.output / name))
    print(f"wrote {config.output}")
    return 0


def _summary(output: Path) -> str:
    index = Index.load(output)
    lines = [
        f"{name}: {split.num_documents:,} documents, {split.num_bytes / 1e6:,.1f} MB, "
        f"{split.num_tokens:,} tokens"
        + (
            f", {split.num_tokens // index.chat_seq_len:,} rows, filled up at their ends"
            if index.chat_seq_len
            else f" ({split.num_bytes / split.num_tokens:.2f} bytes per token)"
        )
        for name, split in index.splits.items()
        if split.num_tokens
    ]
    left_out = [
        f"{count:,} {name}"
        for count, name in [
            (index.num_empty_documents, "empty documents"),
            (index.num_skipped_files, "files of another kind"),
            (index.num_hidden_files, "hidden files and folders"),
            (index.num_repeated_files, "other paths of files already read"),
        ]
        if count
    ]
    if left_out:
        lines.append(f"left out: {', '.join(left_out)}")
    num_bad = sum(index.num_bad_rows.values())
    if num_bad:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in index.num_bad_rows.items())
        lines.append(f"could not be read: {num_bad:,} ({kinds}), see {output / SKIPPED_FILE}")
    num_tokens = sum(split.num_tokens for split in index.splits.values())
    lines.append(f"in all: {index.num_read + num_bad:,} documents, {num_tokens:,} tokens")
    lines += [f"warning: {text}" for text in warnings(index)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
