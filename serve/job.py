"""What decides the rows of a batch: the model, the input and the settings."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serve.batch_config import BatchConfig
from serve.completions import DEFAULTS, Completions
from serve.inputs import Source, open_input
from serve.openai_rows import OpenAiRows
from serve.prompts import SETTINGS, RequestBuilder
from serve.rows import PromptRows, RowFormat
from serve.sampling import SamplingParams
from serve.shard import Shard
from stu.checkpoint import load_config, load_generation, load_tokenizer

READ_BYTES = 2**20
SAMPLE_BYTES = 4096
NUM_SAMPLES = 4096


class BatchJob:
    """The rows that `config` asks for, and how they are read and written.

    Raises ValueError for files that cannot be used and settings that are not allowed.
    """

    def __init__(self, config: BatchConfig) -> None:
        self.config = config
        self.source: Source = open_input(config.input, config.column, config.id_column)
        self.tokenizer = load_tokenizer(config.model)
        is_openai = config.format == "openai" or (
            config.format == "auto" and _is_openai(self.source)
        )
        defaults = DEFAULTS if is_openai else load_generation(config.model)
        given = {name: getattr(config, name, None) for name in SETTINGS}
        given = {name: value for name, value in given.items() if value is not None}
        usual = {"stop": [], "stop_at_eos": True, **asdict(SamplingParams())}
        self.settings = {**usual, **defaults, **given}
        max_seq_len = load_config(config.model).max_seq_len
        builder = RequestBuilder(self.tokenizer, max_seq_len, self.settings)
        self.row_format: RowFormat = (
            OpenAiRows(Completions(builder, self.tokenizer, config.model.resolve().name))
            if is_openai
            else PromptRows(builder)
        )

    def identity(self, shard: Shard) -> dict[str, Any]:
        """All that decides the rows of `shard`, as JSON values: what only decides how fast they
        come, or how they round, is left out."""
        config = self.config
        return {
            "input": f"{_num_bytes(config.input)} bytes, sha256 {_sha256(_pieces(config.input))}",
            "shard": str(shard),
            "format": self.row_format.name,
            "column": config.column,
            "id_column": config.id_column,
            **_fingerprint(config.model),
            "dtype": config.dtype,
            "batch_invariant": config.engine.batch_invariant,
            **self.settings,
        }


def _is_openai(source: Source) -> bool:
    first = next((given for _, given in source if not isinstance(given, ValueError)), {})
    return "custom_id" in first or "body" in first


def _fingerprint(model: Path) -> dict[str, str]:
    """Of each file of a model directory that decides what it computes.

    The weights may be many gigabytes: of those, samples, close enough for each large matrix to
    have some, for training changes every matrix.
    """
    weights = model / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{weights}: no such file; is {model} a model directory?")
    return {
        "config.json": _sha256(_pieces(model / "config.json")),
        "tokenizer.model": _sha256(_pieces(model / "tokenizer.model")),
        "model.safetensors": f"{_num_bytes(weights)} bytes, samples {_sha256(_samples(weights))}",
    }


def _num_bytes(path: Path) -> int:
    return path.stat().st_size


def _sha256(pieces: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            yield piece


def _samples(path: Path) -> Iterator[bytes]:
    num_bytes = _num_bytes(path)
    with path.open("rb") as file:
        for start in range(0, num_bytes, max(SAMPLE_BYTES, num_bytes // NUM_SAMPLES)):
            file.seek(start)
            yield file.read(SAMPLE_BYTES)
