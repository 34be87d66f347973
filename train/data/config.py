"""The settings of `stu-prepare`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from stu.common.array_task import ArrayTask
from stu.common.errors import UserError

TRAINED = ("sentencepiece", "huggingface")
"""Tokenizers that are trained on the text."""
JSON_LINES = "jsonl"
"""Kind of files with conversations."""
CHARACTERS = "characters:"
"""Beginning of a tokenizer that is an alphabet."""


@dataclass(frozen=True)
class PrepareConfig:
    """Settings of `stu-prepare`. Raises UserError for a value that is not allowed."""

    may_be_whole: ClassVar[bool] = False
    """Whether all documents may go to one split."""

    sources: Sequence[str]
    """Files, folders, globs, or `stdlib:`; or one YAML file, a list of sources with weights."""
    output: Path
    """Folder for the token shards; it must be new or empty."""
    vocab_size: int = 4096
    """Vocabulary size of the tokenizer to train; unused if `--tokenizer` names an existing one."""
    tokenizer: str | Path = TRAINED[0]
    """Tokenizer to train on the text: `sentencepiece`, or `huggingface` for a byte-level BPE of the
    tokenizers library. Or a tokenizer to use: `bytes`, `characters:` followed by an alphabet as in
    `characters:ACGTN`, or the path of a `tokenizer.model`, `tokenizer.json`, `alphabet.json` or
    `o200k_base.tiktoken`, or of a folder with one."""
    validation_fraction: float = 0.01
    """Probability that a document goes to the validation split."""
    shard_tokens: int = 100_000_000
    """Maximum number of tokens per file; a longer document gets a file of its own."""
    workers: int = 0
    """Number of tokenizing processes; 0: one per CPU. It does not affect the result."""
    seed: int = 0
    """Seed that decides which documents are held out and which train the tokenizer."""
    text_key: str = "text"
    """JSON field, or CSV, Parquet or Arrow column, that holds the text; `a.b` is the field `b` in
    the field `a`."""
    kind: Literal["text", "jsonl", "csv", "parquet", "arrow"] | None = None
    """Kind of all files, whatever their names. None: by their names; other files in folders are
    skipped."""
    allow_hub: bool = False
    """Whether sources may be read from the Hugging Face Hub: `hf://datasets/ORG/NAME/..`."""
    on_error: Literal["stop", "skip"] = "stop"
    """Action for a row, or the rest of a damaged file, that cannot be read: `stop` with an
    error that names it, or `skip` it and list the first 1,000 in `skipped.jsonl` in the output."""
    part: str | None = None
    """Part of the corpus to tokenize in this run: I/N, with I from 0 to N - 1, for one of N runs.
    The run that completes the last part joins all of them in the output. Files are not divided.
    None: the whole corpus."""
    chat_seq_len: int = 0
    """Prepare conversations for training with this `data.seq_len`: sources are JSON lines of
    `{"messages": [{"role": .., "content": ..}, ..]}`. Whole conversations are packed into rows of
    that many tokens, and only answers are trained on. It needs `--tokenizer`. 0: sources are
    texts."""
    chat_template: Path | None = None
    """Chat template of conversations: a file, or a folder with one. None: that in the folder of
    `--tokenizer`, or if it has none, each content on the line after its role, and EOS after
    answers."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("SOURCE", message="name at least one file, folder or glob, or stdlib:")
        fraction = self.validation_fraction
        is_fraction = 0 < fraction < 1 or (self.may_be_whole and fraction in (0, 1))
        for name, is_allowed, allowed in [
            ("vocab_size", self.vocab_size >= 1, "at least 1"),
            ("validation_fraction", is_fraction, "between 0 and 1"),
            ("shard_tokens", self.shard_tokens >= 1, "at least 1"),
            ("workers", self.workers >= 0, "at least 1, or 0 for one per CPU"),
            ("chat_seq_len", self.chat_seq_len >= 0, "a whole number >= 0"),
            ("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1"),
        ]:
            if not is_allowed:
                raise UserError(name, getattr(self, name), allowed)
        letters = str(self.tokenizer).removeprefix(CHARACTERS)
        if letters != str(self.tokenizer) and not 0 < len(letters) == len({*letters}):
            allowed = f"{CHARACTERS} and different characters, such as {CHARACTERS}ACGTN"
            raise UserError("tokenizer", str(self.tokenizer), allowed)
        if self.part is not None:
            ArrayTask.parse(self.part)
        self._check_chat()

    @property
    def row_key(self) -> str:
        """Field or column of a row to read; empty for the whole row."""
        return "" if self.chat_seq_len else self.text_key

    def _check_chat(self) -> None:
        if not self.chat_seq_len:
            if self.chat_template is not None:
                fix = "it needs --chat-seq-len"
                raise UserError("chat_template", str(self.chat_template), fix=fix)
            return
        if str(self.tokenizer) in TRAINED:
            fix = "give the model directory to fine-tune, as conversations train no tokenizer"
            raise UserError("tokenizer", str(self.tokenizer), fix=fix)
        if self.kind not in (None, JSON_LINES):
            raise UserError("kind", self.kind, f"{JSON_LINES} with --chat-seq-len")
        if self.text_key != PrepareConfig.text_key:
            fix = "leave it out: a row is a whole conversation with --chat-seq-len"
            raise UserError("text_key", self.text_key, fix=fix)
        if self.part is not None:
            fix = "leave it out: conversations are prepared in one run"
            raise UserError("part", self.part, fix=fix)
