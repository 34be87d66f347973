"""The tokenizer of a corpus: copied, or trained on a sample of the training documents."""

import heapq
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

from stu.common.errors import UserError
from stu.tokenizer import Tokenizer, train_bpe
from train.data.config import PrepareConfig
from train.data.corpus import read_texts, require_both_splits
from train.data.encode import split_of, text_hash
from train.data.shards import TOKENIZER_FILE
from train.data.skipped import Skipped
from train.data.sources import Files

TOKENIZER_SAMPLE_BYTES = 64 << 20
"""Text that the tokenizer is trained on; training needs many times as much memory."""


def make_tokenizer(config: PrepareConfig, files: Files, folder: Path) -> Tokenizer:
    """Write `tokenizer.model` to `folder`: a copy of `config.tokenizer`, or a new one for `files`.

    Raises UserError or OSError.
    """
    path = folder / TOKENIZER_FILE
    if config.tokenizer is not None:
        path.write_bytes(load_tokenizer(config.tokenizer).model_bytes)
        return Tokenizer(path)
    sample = _sample(config, files)
    print("training the tokenizer", file=sys.stderr, flush=True)
    return train_bpe(sample, config.vocab_size, path)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a model, or the one in a folder. Raises UserError if it cannot mark documents."""
    tokenizer = Tokenizer(path / TOKENIZER_FILE if path.is_dir() else path)
    if min(tokenizer.bos_id, tokenizer.eos_id) < 0:
        raise UserError("tokenizer", str(path), "a model with BOS and EOS, which mark documents")
    return tokenizer


def _sample(config: PrepareConfig, files: Files) -> list[str]:
    """Return the training documents with the smallest hashes, up to `TOKENIZER_SAMPLE_BYTES`."""
    sample: list[tuple[float, str]] = []  # a heap with the largest hash first
    sample_bytes = 0
    num_documents = Counter[str]()
    with closing(read_texts(config, files, "choosing text", Skipped())) as documents:
        for document in documents:
            split = split_of(document.text, config.seed, config.validation_fraction)
            num_documents[split] += 1
            if split != "train":
                continue
            start = document.text[:TOKENIZER_SAMPLE_BYTES]
            heapq.heappush(sample, (-text_hash(document.text, config.seed), start))
            sample_bytes += len(start.encode())
            while sample_bytes > TOKENIZER_SAMPLE_BYTES and len(sample) > 1:
                sample_bytes -= len(heapq.heappop(sample)[1].encode())
    require_both_splits(config, num_documents)
    return [text for _, text in sample]
