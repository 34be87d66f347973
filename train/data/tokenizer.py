"""The tokenizer of a corpus: given, or trained on a sample of the training documents."""

import heapq
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from stu.common.errors import UserError
from stu.tokenizer import Tokenizer, make_tokenizer, read_tokenizer
from stu.tokenizers.alphabet import alphabet_files, bytes_files
from stu.tokenizers.hugging_face import train_byte_level_bpe
from stu.tokenizers.sentence_piece import SentencePieceTokenizer, train_bpe
from train.data.config import CHARACTERS, TRAINED, PrepareConfig
from train.data.corpus import read_texts, require_both_splits
from train.data.encode import split_of, text_hash
from train.data.reading.skipped import Skipped
from train.data.reading.sources import Files
from train.data.source_list import named

TOKENIZER_SAMPLE_BYTES = 64 << 20
"""Text that the tokenizer is trained on; training needs many times as much memory."""


class Corpus(NamedTuple):
    """Text of one source, with its settings."""

    config: PrepareConfig
    files: Files
    share: float = 1.0
    """Share of the text that the tokenizer is trained on."""


def write_tokenizer(config: PrepareConfig, corpora: Sequence[Corpus], folder: Path) -> Tokenizer:
    """Write the tokenizer that `config` gives, or a new one trained on `corpora`, to `folder`.

    Raises UserError or OSError.
    """
    given = given_tokenizer(config)
    if given is not None:
        given.save(folder)
        return read_tokenizer(folder)
    sample = []
    for corpus in corpora:
        if corpus.share:
            with named(corpus.config):
                sample += _sample(corpus)
    print("training the tokenizer", file=sys.stderr, flush=True)
    if config.tokenizer == "huggingface":
        return train_byte_level_bpe(sample, config.vocab_size, folder)
    return train_bpe(sample, config.vocab_size, folder / SentencePieceTokenizer.file_name)


def given_tokenizer(config: PrepareConfig) -> Tokenizer | None:
    """Return the tokenizer that `config` gives, or None if one is to be trained.

    Raises UserError if it cannot be used, or cannot mark documents.
    """
    name = str(config.tokenizer)
    if name in TRAINED:
        return None
    if name == "bytes":
        return make_tokenizer(bytes_files(), Path(name))
    if name.startswith(CHARACTERS):
        return make_tokenizer(alphabet_files(name.removeprefix(CHARACTERS)), Path(name))
    tokenizer = read_tokenizer(name)
    if not (tokenizer.start_ids or tokenizer.end_ids):
        raise UserError("tokenizer", name, "one with BOS or EOS, which mark documents")
    return tokenizer


def _sample(corpus: Corpus) -> list[str]:
    """Return the training documents with the smallest hashes, up to the corpus's share of
    `TOKENIZER_SAMPLE_BYTES`."""
    config, files = corpus.config, corpus.files
    most_bytes = round(corpus.share * TOKENIZER_SAMPLE_BYTES)
    sample: list[tuple[float, str]] = []  # a heap with the largest hash first
    sample_bytes = 0
    num_documents = Counter[str]()
    with closing(read_texts(config, files, "choosing text", Skipped())) as documents:
        for document in documents:
            split = split_of(document.text, config.seed, config.validation_fraction)
            num_documents[split] += 1
            if split != "train":
                continue
            start = document.text[:most_bytes]
            heapq.heappush(sample, (-text_hash(document.text, config.seed), start))
            sample_bytes += len(start.encode())
            while sample_bytes > most_bytes and len(sample) > 1:
                sample_bytes -= len(heapq.heappop(sample)[1].encode())
    require_both_splits(config, num_documents)
    return [text for _, text in sample]
