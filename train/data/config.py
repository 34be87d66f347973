"""The settings of `stu-prepare`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stu.common.array_task import ArrayTask


@dataclass(frozen=True)
class PrepareConfig:
    """What `stu-prepare` reads, makes and writes."""

    sources: Sequence[str]
    """Files, folders, globs, or `stdlib:`."""
    output: Path
    """New folder to make; it must not exist, or be empty."""
    vocab_size: int = 4096
    """Tokens of the tokenizer to train; unused if `tokenizer` is given."""
    tokenizer: Path | None = None
    """SentencePiece model to use, or a folder with a `tokenizer.model`. None: train one."""
    validation_fraction: float = 0.01
    """Chance of each document to go to the validation split."""
    shard_tokens: int = 100_000_000
    """Most tokens in one file, unless one document has more."""
    workers: int = 0
    """Processes that tokenize; 0: one for each CPU. The result does not depend on it."""
    seed: int = 0
    """Decides the split, and which documents the tokenizer learns from."""
    text_key: str = "text"
    """JSON field, or CSV or Parquet column, that holds the text."""
    on_error: Literal["stop", "skip"] = "stop"
    """Treatment of a row that cannot be read, or the rest of a damaged file. `stop`: end with
    its file and line. `skip`: leave it out; `skipped.jsonl` in the output lists the first 1,000."""
    part: str | None = None
    """i/n, from 0: do part i of the n that the files make, in a folder beside the output; the run
    that finds all n done puts them together. No file is divided. None: everything."""

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
        if self.part is not None:
            ArrayTask.parse(self.part)
