"""One pass over the text of a corpus, and the pass that writes its tokens."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from stu.common.errors import UserError
from stu.common.machine import num_processors
from stu.tokenizer import Tokenizer
from train.data.config import PrepareConfig
from train.data.conversations import (
    conversation_encoder,
    require_json_lines,
    write_rows,
    write_template,
)
from train.data.encode import Encoded, encode_all, encode_batch, token_dtype
from train.data.progress import show_progress
from train.data.reading.document import BadInput, Document
from train.data.reading.documents import read_documents
from train.data.reading.remote import size_of
from train.data.reading.skipped import Skipped, require_mostly_good
from train.data.reading.sources import Files
from train.data.shards import Index, SplitWriter

EXPECTED_DOCUMENTS = 5
"""Documents that an empty split may expect from the fraction that errors suggest."""


def read_texts(
    config: PrepareConfig, files: Files, task: str, skipped: Skipped
) -> Generator[Document, None, None]:
    """Yield the documents that have text, show progress, and count the others in `skipped`.

    Raises UserError at the first row that cannot be read, or, with `on_error="skip"`, if most rows
    cannot be read (of a part this is not known yet, and allowed).
    """
    num_read = 0
    sizes = sum(map(size_of, files.documents))
    with show_progress(task, sizes) as advance:
        settings = config.row_key, files.piece_bytes, config.kind
        for document in read_documents(files.documents, *settings):
            if isinstance(document, BadInput):
                if config.on_error == "stop":
                    raise UserError(str(document.path), message=str(document)) from document
                skipped.add(document)
                continue
            advance(document.source_bytes)
            num_read += 1
            is_blank = not document.text or document.text.isspace()
            # White space between the pieces of a file is part of the file.
            if is_blank and document.starts and document.ends:
                skipped.num_empty += 1
            else:
                yield document
    if config.part is None:
        require_mostly_good(num_read, skipped.num_bad, skipped.examples)


def write_splits(
    config: PrepareConfig,
    files: Files,
    tokenizer: Tokenizer,
    folder: Path,
    task: str = "tokenizing",
) -> Index:
    """Write the token shards of both splits of `files`; a split may be empty.

    task: Name of the work for its progress.

    Returns the index, which is not saved. Raises UserError, OSError, or BrokenProcessPool if a
    worker dies.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    encoder: Callable[[list[Document]], list[Any]] = partial(
        encode_batch,
        tokenizer_path=tokenizer.path,
        seed=config.seed,
        validation_fraction=config.validation_fraction,
    )
    if config.chat_seq_len:
        require_json_lines(config, files)
        write_template(config, tokenizer, folder)
        encoder = conversation_encoder(config, folder)
    skipped = Skipped()
    answers: dict[str, str] = {}
    with (
        SplitWriter(folder, "train", dtype, config.shard_tokens) as train,
        SplitWriter(folder, "validation", dtype, config.shard_tokens) as validation,
        closing(read_texts(config, files, task, skipped)) as texts,
        closing(encode_all(texts, encoder, config.workers or num_processors())) as encoded,
    ):
        writers = {"train": train, "validation": validation}
        if config.chat_seq_len:
            padding = (tokenizer.end_ids or tokenizer.start_ids)[0]
            answers = write_rows(encoded, writers, folder, config, padding, skipped)
        else:
            _write_texts(encoded, writers, tokenizer)
        splits = {name: writer.finish() for name, writer in writers.items()}
    if config.chat_seq_len:  # rows that were read may be no conversations
        num_good = sum(split.num_documents for split in splits.values())
        require_mostly_good(num_good, skipped.num_bad, skipped.examples)
    skipped.save(folder)
    return Index(
        dtype=dtype.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        seed=config.seed,
        validation_fraction=config.validation_fraction,
        sources=list(config.sources),
        num_skipped_files=len(files.skipped),
        num_empty_documents=skipped.num_empty,
        splits=splits,
        num_hidden_files=files.num_hidden,
        num_repeated_files=files.num_repeated,
        num_bad_rows=dict(skipped.num_bad),
        chat_seq_len=config.chat_seq_len,
        answers_sha256=answers,
    )


def _write_texts(
    encoded: Iterable[Encoded], writers: Mapping[str, SplitWriter], tokenizer: Tokenizer
) -> None:
    num_start, num_end = len(tokenizer.start_ids), len(tokenizer.end_ids)
    previous_split = None  # of the piece that this one continues
    for piece in encoded:
        # BOS where the split lacks the text before, EOS only at the true end of a file.
        starts = piece.starts or piece.split != previous_split
        first, last = 0 if starts else num_start, 0 if piece.ends else num_end
        tokens = piece.tokens[first : len(piece.tokens) - last]
        writers[piece.split].add(tokens, piece.num_bytes, starts)
        previous_split = None if piece.ends else piece.split


def require_both_splits(config: PrepareConfig, num_documents: Mapping[str, int]) -> None:
    """Raise UserError if a split has no documents, unless the fraction of the validation split says
    so. num_documents: by name of the split."""
    train, validation = num_documents["train"], num_documents["validation"]
    total = train + validation
    if not total:
        sources = ", ".join(config.sources)
        raise UserError("SOURCE", message=f"no text in {sources}: every document is empty")
    is_train_due, is_validation_due = config.validation_fraction < 1, config.validation_fraction > 0
    if (train or not is_train_due) and (validation or not is_validation_due):
        return
    if total == 1:
        fix = "one document cannot be in both; give more, or the text as a .txt file"
    else:
        fraction = min(0.5, EXPECTED_DOCUMENTS / total)
        fix = f"raise it to {fraction:.2g}" if train else f"lower it to {1 - fraction:.2g}"
        fix += ", try another --seed, or give more documents"
    raise UserError(
        "--validation-fraction",
        message=f"the {'validation' if train else 'train'} split got none of {total} documents "
        f"with --validation-fraction {config.validation_fraction}: {fix}",
    )
