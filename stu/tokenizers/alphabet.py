"""Tokenizers whose tokens are single bytes, or the characters of an alphabet such as DNA's.

alphabet.json

    {
      "alphabet": {"A": 0, "C": 1, "G": 2, "T": 3, "N": 4},    or "bytes", which have ids 0 to 255
      "special_tokens": {"<bos>": 5, "<eos>": 6},
      "bos_token": "<bos>",        or null
      "eos_token": "<eos>",        or null
      "unknown_token": null        or the special token that stands for any other character
    }
"""

import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from stu.common.errors import UserError, show
from stu.tokenizer import Tokenizer, Vocabulary
from stu.tokenizers.special_tokens import blank_tokens, marks, named_id, read_json, token_ids

BYTES = "bytes"
BOS, EOS = "<bos>", "<eos>"


class AlphabetTokenizer(Tokenizer):
    """A tokenizer with a token for each byte, or for each character of an alphabet."""

    file_name = "alphabet.json"

    def _load(self) -> Vocabulary:
        values = read_json(self.files[self.file_name], self.path)
        special = token_ids(values, "special_tokens", self.path)
        self._is_bytes = values.get("alphabet") == BYTES
        if self._is_bytes:
            symbols = {bytes([byte]): byte for byte in range(256)}
        else:
            symbols = self._characters(
                values, named_id(values, "unknown_token", special, self.path)
            )
        ids = [*symbols.values(), *special.values()]
        if len(set(ids)) < len(ids):
            raise UserError(message=f"tokenizer {self.path}: two tokens have the same id")
        token_bytes = blank_tokens(ids, self.path)
        for symbol, token in symbols.items():
            token_bytes[token] = symbol
        return Vocabulary(
            token_bytes,
            {token: name for name, token in special.items()},
            list(special.values()),
            *marks(values, special, self.path),
        )

    def _characters(self, values: Mapping[str, object], unknown: int) -> dict[bytes, int]:
        """Return the id of each character, and prepare the table for `encode`."""
        alphabet = token_ids(values, "alphabet", self.path)
        if not alphabet or any(len(symbol) > 1 for symbol in alphabet):
            allowed = f'"{BYTES}", or an object with an id for each character'
            raise UserError(message=f"tokenizer {self.path}: alphabet must be {allowed}")
        points = {ord(character): token for character, token in alphabet.items()}
        # Ids by code point; the last one is for all code points after the alphabet's.
        self._table: NDArray[np.int64] = np.full(max(points) + 2, unknown)
        self._table[list(points)] = list(points.values())
        self._letters = "".join(alphabet)
        return {character.encode(): token for character, token in alphabet.items()}

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`. Raises UserError for a character outside the alphabet, unless
        a token stands for those."""
        if self._is_bytes:
            return list(text.encode())
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = self._table[np.minimum(points, len(self._table) - 1)]
        if (ids < 0).any():
            place = int((ids < 0).argmax())
            around = text[max(0, place - 10) : place + 10]
            raise UserError(
                "text",
                around,
                message=f"character {show(text[place])} (number {place + 1}, in {show(around)}) "
                f"is not in the alphabet of the tokenizer, {show(self._letters)}: leave it out",
            )
        tokens: list[int] = ids.tolist()
        return tokens


def bytes_files() -> dict[str, bytes]:
    """Return the files of a tokenizer of all bytes, BOS and EOS."""
    return _files(BYTES, 256)


def alphabet_files(characters: str) -> dict[str, bytes]:
    """Return the files of a tokenizer of `characters`, in this order, then BOS and EOS."""
    return _files({character: token for token, character in enumerate(characters)}, len(characters))


def _files(alphabet: str | Mapping[str, int], size: int) -> dict[str, bytes]:
    values = {
        "alphabet": alphabet,
        "special_tokens": {BOS: size, EOS: size + 1},
        "bos_token": BOS,
        "eos_token": EOS,
        "unknown_token": None,
    }
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    # Halves of surrogate pairs, which a command line may have, are refused where files are read.
    return {AlphabetTokenizer.file_name: text.encode(errors="surrogatepass")}
