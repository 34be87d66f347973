"""A SentencePiece tokenizer that gives back exactly the text it was given."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from stu.common.errors import UserError
from stu.common.files import new_file

SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside a piece
TRAINING_PIECE_CHARS = 1000  # SentencePiece drops sentences of more than 4192 bytes


class Tokenizer:
    """A SentencePiece model, which maps text to token ids and back.

    `decode(encode(text)) == text` for every text that UTF-8 can hold and a model made by
    `train_bpe`, newlines, tabs and runs of spaces included, with one exception: SentencePiece keeps
    U+2581 for itself, and that character comes back as a space.

    Raises UserError if `path` is missing or not a SentencePiece model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(message=f"tokenizer {self.path}: no such file")
        self.model_bytes = self.path.read_bytes()
        self.sha256 = hashlib.sha256(self.model_bytes).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(self.model_bytes)
        except RuntimeError as error:
            raise UserError(message=f"tokenizer {self.path}: not a SentencePiece model") from error
        # An empty file loads without an error, as a model of no pieces.
        if not self.model_bytes or self._processor.get_piece_size() == 0:
            raise UserError(message=f"tokenizer {self.path}: not a SentencePiece model")
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos_id: int = self._processor.bos_id()  # -1 if the model has none
        self.eos_id: int = self._processor.eos_id()  # -1 if the model has none
        # Kept, as a long answer with log probabilities asks a million times.
        self._token_texts: dict[int, str] = {}
        self._token_bytes: dict[int, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without BOS and EOS. Text never yields a control token.

        Raises ValueError if UTF-8 cannot hold `text` (half of a surrogate pair).
        """
        ids: list[int] = self._processor.encode(text.encode())
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Return BOS and the token ids of `text`."""
        return [self.bos_id, *self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Control and unknown tokens have none; broken UTF-8 is U+FFFD.

        Raises IndexError for an id outside the vocabulary.
        """
        known = [int(i) for i in ids if i != self._processor.unk_id()]
        # SentencePiece would take an empty list for an empty batch.
        text: str = self._processor.decode(known) if known else ""
        return text

    def token_text(self, token: int) -> str:
        """Return a token as it is shown alone: its text, `bytes:\\xe2` for a byte of a longer
        character, or the name of a token without text."""
        text = self._token_texts.get(token)
        if text is None:
            text = self._token_texts[token] = self._token_text(token)
        return text

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token: perhaps a part of a character, perhaps none."""
        token_bytes = self._token_bytes.get(token)
        if token_bytes is None:
            token_bytes = self._token_bytes[token] = self._find_bytes(token)
        return token_bytes

    def _token_text(self, token: int) -> str:
        token_bytes = self.token_bytes(token)
        if not token_bytes:
            name: str = self._processor.id_to_piece(token)
            return name
        if self._processor.is_byte(token) and token_bytes[0] >= 128:
            return f"bytes:\\x{token_bytes[0]:02x}"
        return token_bytes.decode()

    def _find_bytes(self, token: int) -> bytes:
        model = self._processor
        if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
            return b""
        piece: str = model.id_to_piece(token)
        if model.is_byte(token):
            return bytes([int(piece[3:-1], 16)])  # <0xE2>
        return piece.replace(SPACE_MARK, " ").encode()

    def control_tokens(self) -> dict[str, int]:
        """Return the ids, by name, of the tokens that no text yields, such as BOS and EOS."""
        model = self._processor
        ids = [token for token in range(self.vocab_size) if model.is_control(token)]
        return {model.id_to_piece(token): token for token in ids}

    def bytes_per_token(self) -> NDArray[np.int64]:
        """Return the UTF-8 length of each token, 0 for control and unknown ones: `[vocab_size]`."""
        sizes = [len(self.token_bytes(token)) for token in range(self.vocab_size)]
        return np.array(sizes, dtype=np.int64)


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
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
    return Tokenizer(path)


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
