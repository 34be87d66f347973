"""Small tokenizers of every kind, trained on the sources and documents of this repository."""

import json
import tempfile
from pathlib import Path

from benchmarks.training.tokenizers import ranks_files
from stu.tokenizer import make_tokenizer, read_tokenizer
from stu.tokenizers.alphabet import alphabet_files, bytes_files
from stu.tokenizers.hugging_face import train_byte_level_bpe
from stu.tokenizers.sentence_piece import train_bpe
from stu.tokenizers.tiktoken_ranks import LAYOUTS

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
        with tempfile.TemporaryDirectory() as name:
            trained = train_byte_level_bpe(texts(), vocab_size + 1, Path(name))
        make_tokenizer(ranks_files(trained, kind), folder).save(folder)
    elif kind == "bytes":
        make_tokenizer(bytes_files(), folder).save(folder)
    else:
        make_tokenizer(alphabet_files(kind), folder).save(folder)
    return read_tokenizer(folder)


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
