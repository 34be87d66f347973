"""SentencePiece models, and the training of one that gives back exactly the text it was given."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from stu.common.errors import UserError
from stu.common.files import new_file
from stu.tokenizer import Tokenizer, Vocabulary

SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside a piece
TRAINING_PIECE_CHARS = 1000  # SentencePiece drops sentences of more than 4192 bytes


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    `decode(encode(text)) == text` for every text that UTF-8 can hold and a model made by
    `train_bpe`, newlines, tabs and runs of spaces included, with one exception: SentencePiece keeps
    U+2581 for itself, and that character comes back as a space.
    """

    file_name = "tokenizer.model"

    def _load(self) -> Vocabulary:
        model_bytes = self.files[self.file_name]
        model = self._model = sentencepiece.SentencePieceProcessor()
        try:
            model.load_from_serialized_proto(model_bytes)
        except RuntimeError as error:
            message = f"tokenizer {self.path}: not a SentencePiece model"
            raise UserError(message=message) from error
        size = self._num_pieces = model.get_piece_size()
        # An empty file loads without an error, as a model of no pieces.
        if not model_bytes or size == 0:
            raise UserError(message=f"tokenizer {self.path}: not a SentencePiece model")
        pieces = [model.id_to_piece(token) for token in range(size)]
        has_text = [
            not (model.is_control(i) or model.is_unknown(i) or model.is_unused(i))
            for i in range(size)
        ]
        return Vocabulary(
            [
                _piece_bytes(piece, model.is_byte(token)) if has_text[token] else b""
                for token, piece in enumerate(pieces)
            ],
            {token: piece for token, piece in enumerate(pieces) if not has_text[token]},
            [token for token in range(size) if model.is_control(token)],
            model.bos_id() if model.bos_id() >= 0 else model.eos_id(),
            model.eos_id(),
        )

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        ids: list[int] = self._model.encode(text.encode())
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`. A space that the model puts before texts is left out."""
        known = [int(token) for token in ids if token != self._model.unk_id()]
        if max(known, default=0) >= self._num_pieces:  # IndexError: outside the vocabulary as well
            known = [token for token in known if self._bytes[token]]
        # SentencePiece would take an empty list for an empty batch.
        text: str = self._model.decode(known) if known else ""
        return text


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> SentencePieceTokenizer:
    """Train a byte-fallback BPE model on `texts` and write it to `path`.

    Ids: 0 unknown (never produced), 1 BOS, 2 EOS, then newline, tab, the 256 bytes, and the learned
    pieces. The same texts give the same file. Nothing is written if training fails.

    Raises UserError if there is no text, or naming the limit if `vocab_size` is too large or too
    small for it.
    """
    path = Path(path)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_pieces(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            # Text must come back unchanged: no normalisation, no added or removed spaces.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            pad_id=-1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        message = _training_failure(str(error), vocab_size)
        raise UserError("vocab_size", message=message) from error
    with new_file(path) as temporary:
        temporary.write_bytes(model.getvalue())
    return SentencePieceTokenizer({SentencePieceTokenizer.file_name: model.getvalue()}, path)


def _training_pieces(texts: Iterable[str]) -> Iterator[str]:
    """Split texts into lines, which no learned piece crosses, cut to what the trainer accepts."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), TRAINING_PIECE_CHARS):
                yield line[start : start + TRAINING_PIECE_CHARS]


def _training_failure(message: str, vocab_size: int) -> str:
    """Translate SentencePiece's error `message` into what the user can do."""
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on"
    if limit := re.search(r"value <= (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too large for this text: "
            f"the largest that works is {limit[1]}"
        )
    if limit := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small for this text: "
            f"the smallest that works is {limit[1]}"
        )
    return f"SentencePiece could not train a tokenizer of vocab_size {vocab_size}: {message}"


def _piece_bytes(piece: str, is_byte: bool) -> bytes:
    if is_byte:
        return bytes([int(piece[3:-1], 16)])  # <0xE2>
    return piece.replace(SPACE_MARK, " ").encode()
