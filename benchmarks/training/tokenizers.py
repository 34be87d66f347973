"""`python -m benchmarks tokenizers`: the speed of each kind of tokenizer beside its own library.

Vocabularies are trained on the texts that are then encoded, Python's own sources, one document at
a time, on one thread. Ranks for tiktoken have the merges of the tokenizer.json.
"""

import base64
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from benchmarks.machine import describe
from benchmarks.timing import median_seconds
from stu.tokenizer import Tokenizer, make_tokenizer
from stu.tokenizers.alphabet import alphabet_files, bytes_files
from stu.tokenizers.hugging_face import train_byte_level_bpe
from stu.tokenizers.sentence_piece import train_bpe
from stu.tokenizers.tiktoken_ranks import END, LAYOUTS, settings_file
from train.data.reading.sources import STDLIB, find_files, read_python

Encode = Callable[[str], Any]


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    megabytes: PositiveInt = 4
    """Megabytes of text to encode."""
    vocab_size: PositiveInt = 4096
    """Tokens of the vocabularies, except for bytes and characters."""
    repeats: PositiveInt = 5
    """Timed passes of each."""


def measure(options: Options) -> dict[str, Any]:
    """Return megabytes a second of each tokenizer and of its library, which take turns."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts, num_bytes = read_texts(options.megabytes * 1_000_000)
    runs = []
    for name, (tokenizer, library) in subjects(texts, options.vocab_size).items():
        calls: dict[str, Encode] = {"ours": tokenizer.encode} | (
            {"library": library} if library else {}
        )
        passes = {key: lambda encode=encode: [*map(encode, texts)] for key, encode in calls.items()}
        seconds = median_seconds(passes, options.repeats)
        num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
        speeds = {f"{key}_mb_per_second": num_bytes / 1e6 / s for key, s in seconds.items()}
        size = {"vocab_size": tokenizer.vocab_size, "bytes_per_token": num_bytes / num_tokens}
        runs.append({"tokenizer": name, "threads": 1} | size | speeds)
    return {"machine": describe(), "num_bytes": num_bytes, "runs": runs}


def read_texts(most_bytes: int) -> tuple[list[str], int]:
    """Return modules of the standard library, and their size in UTF-8."""
    texts, num_bytes = [], 0
    for path in find_files([STDLIB]).documents:
        text = read_python(path)
        if num_bytes + len(text.encode()) <= most_bytes:
            texts.append(text)
            num_bytes += len(text.encode())
    return texts, num_bytes


def subjects(texts: list[str], vocab_size: int) -> dict[str, tuple[Tokenizer, Encode | None]]:
    """Return a tokenizer of each kind, and the function of its library that encodes a text."""
    import sentencepiece
    import tiktoken
    import tokenizers

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pieces = train_bpe(texts, vocab_size, folder / "tokenizer.model")
        trained = train_byte_level_bpe(texts, vocab_size, folder)
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces.files[pieces.file_name])
    library = tokenizers.Tokenizer.from_buffer(trained.files[trained.file_name])
    found: dict[str, tuple[Tokenizer, Encode | None]] = {
        "SentencePiece": (pieces, processor.encode),
        "tokenizer.json": (
            trained,
            lambda text: library.encode(text, add_special_tokens=False).ids,
        ),
    }
    for layout, settings in LAYOUTS.items():
        ranks = make_tokenizer(ranks_files(trained, layout), folder)
        encoding = tiktoken.Encoding(
            layout,
            pat_str=settings["pattern"],
            mergeable_ranks={ranks.token_bytes(i): i for i in range(ranks.vocab_size - 1)},
            special_tokens={},
        )
        found[f"tiktoken, {layout}"] = ranks, encoding.encode_ordinary
    found["bytes"] = make_tokenizer(bytes_files(), folder), None
    characters = alphabet_files("".join(sorted({*"".join(texts)})))
    found["characters"] = make_tokenizer(characters, folder), None
    return found


def ranks_files(trained: Tokenizer, layout: str) -> dict[str, bytes]:
    """Return the files of a tokenizer of tiktoken with the tokens of a byte-level BPE.

    Its last token separates documents. trained: Made by `train_byte_level_bpe`.
    """
    control = trained.control_tokens().values()
    tokens = [token for token in range(trained.vocab_size) if token not in control]
    lines = [
        base64.b64encode(trained.token_bytes(token)) + b" %d\n" % rank
        for rank, token in enumerate(tokens)
    ]
    settings = LAYOUTS[layout] | {"special_tokens": {END: len(tokens)}}
    return {
        "tokenizer.tiktoken": b"".join(lines),
        "tokenizer.tiktoken.json": settings_file(settings),
    }
