"""The model, input and settings that decide the rows of a batch."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from serve.batch.config import OPENAI_HAS_NO_SCORES, BatchConfig
from serve.batch.openai_rows import OpenAiRows
from serve.batch.rows import PromptRows, RowFormat
from serve.batch.score_rows import ScoreRows
from serve.batch.source import InputDigest, Source, open_input
from serve.openai.chat import ChatCompletions
from serve.openai.completions import DEFAULTS, TextCompletions
from serve.openai.embeddings import Embeddings
from serve.openai.responses.endpoint import Responses
from serve.openai.text_scores import TextScores
from serve.prompts import SETTINGS, RequestBuilder, default_params
from serve.sampling_params import SamplingParams
from stu.chat.template import ChatTemplate
from stu.common.errors import UserError
from stu.model_dir import load_config, load_generation, load_tokenizer
from stu.tokenizer import tokenizer_files

READ_BYTES = 2**20
SAMPLE_BYTES = 4096
NUM_SAMPLES = 4096


class BatchJob:
    """Rows of a batch run, and their formats.

    digest: digest of the input, which must not change afterwards. Raises UserError for a model that
    cannot be used and for settings that are not allowed.
    """

    def __init__(self, config: BatchConfig, digest: InputDigest, source: Source) -> None:
        self.config, self.digest, self.source = config, digest, source
        self.tokenizer = load_tokenizer(config.model)
        is_openai = config.format == "openai" or (
            config.format == "auto" and _is_openai(self.source)
        )
        if is_openai and config.score:
            raise UserError("input", message=f"input {config.input}: {OPENAI_HAS_NO_SCORES}")
        defaults = DEFAULTS if is_openai else load_generation(config.model)
        options = {name: getattr(config, name, None) for name in SETTINGS}
        options = {name: value for name, value in options.items() if value is not None}
        builtin = {name: getattr(SamplingParams(), name) for name in SETTINGS}
        self.settings = {**builtin, **defaults, **options}
        model = load_config(config.model)
        builder = RequestBuilder(self.tokenizer, self.settings)
        self._chat: dict[str, Any] = {}
        self.row_format: RowFormat = PromptRows(builder)
        if config.score:
            self.row_format, self.settings = ScoreRows(self.tokenizer), {}
        elif is_openai:
            template = ChatTemplate(config.model, self.tokenizer)
            max_tokens = config.max_new_tokens
            if max_tokens is None:
                max_tokens = default_params(config.model, self.tokenizer).max_new_tokens
            common: dict[str, Any] = {
                "tokenizer": self.tokenizer,
                "model_name": config.model.resolve().name,
                "max_seq_len": model.max_seq_len,
            }
            chats = ChatCompletions(template, max_tokens, builder=builder, **common)
            self.row_format = OpenAiRows(
                {
                    "/v1/completions": TextCompletions(builder, **common),
                    "/v1/chat/completions": chats,
                    "/v1/responses": Responses(chats, **common),
                    "/v1/embeddings": Embeddings(model.width, **common),
                    "/v1/score": TextScores(**common),
                }
            )
            template_sha256 = hashlib.sha256(template.source.encode()).hexdigest()
            self._chat = {"chat_template": template_sha256, "chat_max_tokens": max_tokens}

    @classmethod
    def of_files(cls, config: BatchConfig, digest: InputDigest) -> "BatchJob":
        """Return the job of the files at `config.input`. Raises UserError if they cannot be
        used."""
        source = open_input(config.input, digest, config.column, config.id_column)
        return cls(config, digest, source)

    def model_and_settings(self) -> dict[str, Any]:
        """Return everything except the input that determines the rows, as JSON values.

        The files of the model are read anew. Settings that only affect speed are left out."""
        config = self.config
        values = {
            "format": self.row_format.name,
            "column": config.column,
            "id_column": config.id_column,
            **_fingerprint(config.model),
            "dtype": config.dtype,
            "weights": config.engine.weights,
            "batch_invariant": config.engine.batch_invariant,
            **self.settings,
            **self._chat,
        }
        return dict(json.loads(json.dumps(values)))  # to compare with values read from JSON

    def require_same(self, model_and_settings: Mapping[str, Any]) -> None:
        """Raise UserError if `model_and_settings` has changed since the run began."""
        now = self.model_and_settings()
        different = [name for name in now if now[name] != model_and_settings.get(name)]
        if different:
            raise UserError(
                "model",
                message=f"model {self.config.model}: {', '.join(different)} changed while this run "
                "loaded it; restore the old one and give the same command again, or start anew "
                "with --overwrite",
            )


def _is_openai(source: Source) -> bool:
    first = next((fields for _, fields in source if not isinstance(fields, UserError)), {})
    return "custom_id" in first or "body" in first


def _fingerprint(model: Path) -> dict[str, str]:
    """Return a fingerprint of each file of a model directory that affects its outputs.

    Weights may take many gigabytes, so only samples of them are read, close enough to touch every
    large matrix: training changes them all.
    """
    with open_weights(model) as weights:
        return {
            "config.json": _sha256(_pieces(model / "config.json")),
            **{
                name: hashlib.sha256(contents).hexdigest()
                for name, contents in tokenizer_files(model).items()
            },
            "model.safetensors": fingerprint_of(weights),
        }


def open_weights(model: Path) -> BinaryIO:
    """Open the file of the weights. Raises UserError if there is none."""
    path = model / "model.safetensors"
    if not path.is_file():
        raise UserError("model", message=f"{path}: no such file; is {model} a model directory?")
    return path.open("rb")


def fingerprint_of(weights: BinaryIO) -> str:
    """Return the size of the weights and a hash of samples."""
    num_bytes = os.fstat(weights.fileno()).st_size
    return f"{num_bytes} bytes, samples {_sha256(_samples(weights, num_bytes))}"


def _sha256(pieces: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            yield piece


def _samples(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    for start in range(0, num_bytes, max(SAMPLE_BYTES, num_bytes // NUM_SAMPLES)):
        file.seek(start)
        yield file.read(SAMPLE_BYTES)
