"""Small tokenizers of every kind, trained on the sources and documents of this repository."""

import base64
import json
from pathlib import Path

from stu.tokenizer import make_tokenizer, read_tokenizer
from stu.tokenizers.alphabet import alphabet_files, bytes_files
from stu.tokenizers.hugging_face import BOS, EOS, train_byte_level_bpe
from stu.tokenizers.sentence_piece import train_bpe
from stu.tokenizers.tiktoken_ranks import END, LAYOUTS, settings_file
from stu.tokenizers.token_decoding import BYTE_OF

ROOT = Path(__file__).parents[3]
KINDS = ["sentencepiece", "huggingface", "llama", "o200k_base", "cl100k_base", "bytes"]
"""Kinds that hold every text."""


def texts():
    """Return sources and documents of this repository, and text in several scripts."""
    paths = [*sorted((ROOT / "stu").glob("*.py")), *sorted((ROOT / "docs").glob("*.md"))]
    scripts = ["Grüße aus München, élève, 東京の夜, привет мир. 👩‍👩‍👧 100 000,5 €\n" * 20]
    return [path.read_text(encoding="utf-8") for path in paths] + scripts


def make(kind, folder, vocab_size=700):
    """Make a tokenizer of `kind` in `folder`, and read it."""
    folder.mkdir()
    if kind == "sentencepiece":
        train_bpe(texts(), vocab_size, folder / "tokenizer.model")
    elif kind == "huggingface":
        train_byte_level_bpe(texts(), vocab_size, folder)
    elif kind == "llama":
        write_llama(folder, vocab_size)
    elif kind in LAYOUTS:
        write_ranks(folder, kind, vocab_size)
    elif kind == "bytes":
        make_tokenizer(bytes_files(), folder).save(folder)
    else:
        make_tokenizer(alphabet_files(kind), folder).save(folder)
    return read_tokenizer(folder)


def write_ranks(folder, layout, vocab_size):
    """Write ranks from the merges of a byte-level BPE, to be split as in `layout`."""
    trained = train_byte_level_bpe(texts(), vocab_size + 1, folder)
    vocabulary = json.loads(trained.files["tokenizer.json"])["model"]["vocab"]
    ids = sorted((i, name) for name, i in vocabulary.items() if name not in (BOS, EOS))
    symbols = [bytes([BYTE_OF[character] for character in name]) for _, name in ids]
    lines = [
        base64.b64encode(symbol) + f" {rank}\n".encode() for rank, symbol in enumerate(symbols)
    ]
    settings = LAYOUTS[layout] | {"special_tokens": {END: vocab_size - 1}}
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.tiktoken").write_bytes(b"".join(lines))
    (folder / "tokenizer.tiktoken.json").write_bytes(settings_file(settings))


def write_llama(folder, vocab_size):
    """Write a tokenizer.json as Llama 2 has: a mark for spaces, one before the text, and bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    mark, fallback = "\u2581", [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend(mark), normalizers.Replace(" ", mark)]
    )
    steps = [decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse()]
    trained.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special + fallback, show_progress=False
    )
    words = [word for text in texts() for word in text.split()]
    trained.train_from_iterator(words, trainer)
    trained.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    described = json.loads(trained.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < 3]
    (folder / "tokenizer.json").write_text(json.dumps(described))
    names = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": "x"}))
