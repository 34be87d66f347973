"""The interface of tokenizers, and the registry that finds the kind of one by its file."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stu.common.errors import UserError, show
from stu.common.text import require_unicode

TOKENIZERS = {
    "tokenizer.model": "stu.tokenizers.sentence_piece:SentencePieceTokenizer",
    "tokenizer.json": "stu.tokenizers.hugging_face:HuggingFaceTokenizer",
    "tokenizer.tiktoken": "stu.tokenizers.tiktoken_ranks:TiktokenTokenizer",
    "alphabet.json": "stu.tokenizers.alphabet:AlphabetTokenizer",
}
"""Import paths of the kinds of tokenizers, by the file that a folder with one has. A kind is a
subclass of `Tokenizer`, imported when it is used."""
SUFFIXES = {".json": "tokenizer.json", ".tiktoken": "tokenizer.tiktoken"}
"""Kinds of files of other names; all others are SentencePiece models."""
MOST_UNUSED = 1024
"""Most ids of a model that may belong to no token."""


class Vocabulary(NamedTuple):
    """The tokens of a tokenizer."""

    token_bytes: list[bytes]
    """Bytes of each token; empty for tokens without text."""
    names: dict[int, str]
    """Names of tokens without text, such as `</s>`."""
    control: list[int]
    """Ids of control tokens."""
    bos_id: int
    eos_id: int


class Tokenizer(ABC):
    """Maps text to token ids and back.

    A token stands for bytes of UTF-8, which may be only a part of a character. Control tokens, such
    as BOS and EOS, stand for no text, and encoding a text never gives them.

    Args:
        files: Contents of the tokenizer's files by name (see `read_files`).
        path: Where they were read, for messages.

    Raises UserError if the files are damaged or not supported, or have other names.
    """

    file_name: ClassVar[str]
    """Name of the main file, as in `TOKENIZERS`."""
    other_files: ClassVar[tuple[str, ...]] = ()
    """Names of the files that may lie beside it."""

    def __init__(self, files: Mapping[str, bytes], path: Path) -> None:
        # The names in a checkpoint are anyone's, and `save` writes to them.
        own = (self.file_name, *self.other_files)
        if foreign := [name for name in files if name not in own]:
            message = f"tokenizer {path}: it has a file named {show(foreign[0])}, and only "
            raise UserError(message=f"{message}{' and '.join(own)} can belong to it")
        self.files, self.path = dict(files), path
        vocabulary = self._load()
        self._bytes, self._names = vocabulary.token_bytes, vocabulary.names
        self._control = {self._names[token]: token for token in vocabulary.control}
        self.bos_id = vocabulary.bos_id
        """Id of the token that begins texts; -1 if there is none. If a tokenizer has an EOS and
        does not say whether it has a BOS, EOS serves as BOS too."""
        self.eos_id = vocabulary.eos_id
        """Id of the token that ends texts; -1 if there is none."""

    @classmethod
    def read_files(cls, path: Path) -> dict[str, bytes]:
        """Return the files, by name, that store the tokenizer of file `path` completely.

        Equal tokenizers have equal files, whatever else lies beside them. Raises UserError.
        """
        return {cls.file_name: path.read_bytes()}

    @abstractmethod
    def _load(self) -> Vocabulary:
        """Prepare to encode, and return the vocabulary."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without BOS and EOS. Text never yields a control token.

        Raises ValueError if UTF-8 cannot hold `text` (half of a surrogate pair), and UserError if
        no tokens stand for a part of it.
        """

    def encode_prompt(self, text: str) -> list[int]:
        """Return BOS, if there is one, and the token ids of `text`."""
        return [*self.start_ids, *self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Tokens without text add none; broken UTF-8 is U+FFFD.

        Raises IndexError for an id outside the vocabulary.
        """
        tokens = list(ids)
        if min(tokens, default=0) < 0:
            raise IndexError(f"token {min(tokens)} is outside the vocabulary")
        return b"".join([self._bytes[token] for token in tokens]).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token, which may be a part of a character, or empty."""
        return self._bytes[token]

    def token_text(self, token: int) -> str:
        """Return a token as shown on its own: its text, `bytes:\\xe2` if it is a part of a
        character, or the name of a token without text."""
        token_bytes = self._bytes[token]
        if not token_bytes:
            return self._names.get(token, f"<unused {token}>")
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)

    def control_tokens(self) -> dict[str, int]:
        """Return the ids of the control tokens, such as BOS and EOS, by name."""
        return dict(self._control)

    def bytes_per_token(self) -> NDArray[np.int64]:
        """Return the UTF-8 length of each token, 0 for those without text: `[vocab_size]`."""
        return np.array([len(token_bytes) for token_bytes in self._bytes], dtype=np.int64)

    @property
    def vocab_size(self) -> int:
        """Number of ids, including those that belong to no token."""
        return len(self._bytes)

    @property
    def start_ids(self) -> list[int]:
        """Ids before a text: BOS, or nothing."""
        return [self.bos_id] if self.bos_id >= 0 else []

    @property
    def end_ids(self) -> list[int]:
        """Ids after a document: EOS, or nothing where the BOS of the next document is the same."""
        return [self.eos_id] if self.eos_id not in (-1, self.bos_id) else []

    @cached_property
    def sha256(self) -> str:
        """Checksum of the files."""
        return files_sha256(self.files)

    def pad(self, vocab_size: int) -> None:
        """Add ids without tokens up to the `vocab_size` of a model.

        Raises UserError if the model has fewer ids, or so many more that another tokenizer must
        belong to it.
        """
        unused = vocab_size - self.vocab_size
        if not 0 <= unused <= MOST_UNUSED:
            raise UserError(
                "tokenizer",
                message=f"tokenizer {self.path}: has {self.vocab_size} tokens and the model "
                f"vocab_size={vocab_size}, which must be at least that and at most {MOST_UNUSED} "
                "more: give the tokenizer that the model was trained with",
            )
        self._bytes += [b""] * unused

    def save(self, folder: Path) -> None:
        """Write the files to `folder`."""
        for name, contents in self.files.items():
            (folder / name).write_bytes(contents)


def read_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Read the tokenizer of a file, or of a folder that has one (`find_tokenizer`).

    A file of another name is read as a tokenizer.json if it ends in .json, as ranks of tiktoken if
    it ends in .tiktoken, and else as a SentencePiece model.

    vocab_size: Number of ids of the model, if there is one (`Tokenizer.pad`). Raises UserError.
    """
    file = find_tokenizer(path)
    return make_tokenizer(tokenizer_files(file), file, vocab_size)


def find_tokenizer(path: str | Path) -> Path:
    """Return the main file of a tokenizer, given that file or its folder: the one of `TOKENIZERS`
    there, else the only *.tiktoken. Raises UserError."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(message=f"tokenizer {path}: no such file")
    found = tokenizers_in(path)
    if not found:
        names = ", ".join(TOKENIZERS)
        raise UserError(message=f"tokenizer {path}: has none of {names}, nor other *.tiktoken")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        fix = "name one of these files instead of the folder, or leave only that one in it"
        raise UserError(message=f"tokenizer {path}: has {names}: {fix}")
    return found[0]


def tokenizers_in(folder: Path) -> list[Path]:
    """Return the main files of the tokenizers in a folder, for `find_tokenizer`."""
    found = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    return found or sorted(folder.glob("*.tiktoken"))  # ranks as they are published


def tokenizer_files(path: str | Path) -> dict[str, bytes]:
    """Return the files, by name, that store the tokenizer of a file or folder. Raises UserError."""
    file = find_tokenizer(path)
    return _kind(_standard_name(file)).read_files(file)


def make_tokenizer(
    files: Mapping[str, bytes], path: Path, vocab_size: int | None = None
) -> Tokenizer:
    """Return the tokenizer of the files that `tokenizer_files` read from `path`.

    vocab_size: As for `read_tokenizer`. Raises UserError.
    """
    name = next((name for name in TOKENIZERS if name in files), None)
    if name is None:
        raise UserError(message=f"tokenizer {path}: has none of {', '.join(TOKENIZERS)}")
    tokenizer = _kind(name)(files, path)
    if vocab_size is not None:
        tokenizer.pad(vocab_size)
    return tokenizer


def encode_text(tokenizer: Tokenizer, field: str, text: str) -> list[int]:
    """Return the token ids of the text in `field`. Raises UserError if there are none for it."""
    require_unicode(field, text)
    try:
        return tokenizer.encode(text)
    except UserError as error:
        raise error.renamed(field) from error


def files_sha256(files: Mapping[str, bytes]) -> str:
    """Return a checksum of the files of a tokenizer: of the contents if there is one file."""
    if len(files) == 1:
        return hashlib.sha256(*files.values()).hexdigest()
    digest = hashlib.sha256()
    for name, contents in sorted(files.items()):
        digest.update(f"{name} {len(contents)}\n".encode() + contents)
    return digest.hexdigest()


def _standard_name(file: Path) -> str:
    if file.name in TOKENIZERS:
        return file.name
    return SUFFIXES.get(file.suffix.lower(), "tokenizer.model")


def _kind(name: str) -> type[Tokenizer]:
    module, _, attribute = TOKENIZERS[name].partition(":")
    kind: type[Tokenizer] = getattr(import_module(module), attribute)
    return kind
