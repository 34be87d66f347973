"""Small token shards for tests: token `i` of a split has the value `i`."""

import hashlib
from pathlib import Path

import numpy as np

from train.data.shards import Index, SplitWriter, TokenShards


def write_token_shards(
    folder: Path,
    num_train: int = 1000,
    num_validation: int = 100,
    shard_tokens: int = 300,
    document_tokens: int = 7,
    dtype: type[np.unsignedinteger] = np.uint16,
) -> Index:
    """Write `folder`: documents of `document_tokens` (the last one shorter), a dummy tokenizer."""
    folder.mkdir()
    model = b"stands for a tokenizer"
    (folder / "tokenizer.model").write_bytes(model)
    splits = {}
    for name, num_tokens in [("train", num_train), ("validation", num_validation)]:
        with SplitWriter(folder, name, np.dtype(dtype), shard_tokens) as writer:
            for start in range(0, num_tokens, document_tokens):
                stop = min(start + document_tokens, num_tokens)
                writer.add(np.arange(start, stop, dtype=dtype), num_bytes=10)
            splits[name] = writer.finish()
    index = Index(
        dtype=np.dtype(dtype).name,
        tokenizer_sha256=hashlib.sha256(model).hexdigest(),
        vocab_size=int(np.iinfo(dtype).max) + 1,
        seed=0,
        validation_fraction=0.1,
        sources=["test"],
        num_skipped_files=0,
        num_empty_documents=0,
        splits=splits,
    )
    index.save(folder)
    return index


def read_tokens(folder: Path) -> dict[str, list[int]]:
    """Return all tokens of both splits."""
    splits = {split: TokenShards(folder, split) for split in ("train", "validation")}
    return {split: shards.read(0, len(shards)).tolist() for split, shards in splits.items()}
