"""Facts and filler for retrieval, as tokens of any tokenizer.

Each piece is encoded by itself, so that a fact has the same tokens wherever it stands.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from stu.common.errors import UserError
from stu.tokenizer import Tokenizer

SENTENCES = (
    " The road along the river was quiet that morning.",
    " Two boats lay at the pier, and nobody had come to load them.",
    " A baker carried bread from door to door before the shops opened.",
    " Rain had fallen in the night, and the fields smelled of wet hay.",
    " The teacher counted the chairs and closed the window.",
    " In the market, people argued about the price of apples.",
    " An old dog slept in the shade of the wall.",
    " Clouds came over the hills, then went away to the east.",
    " The clock of the town hall was late again.",
    " Children threw stones into the pond and watched the rings spread.",
    " A train passed without stopping at the station.",
    " Someone had painted the gate green.",
)
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
KEY_CHOICES, VALUE_CHOICES = 2**30, 2**16
"""Numbers of keys and values, at least, that strings of symbols are long enough for."""


class Fact(NamedTuple):
    """A key and its value."""

    key: list[int]
    value: list[int]
    end: list[int]
    """Tokens that follow the value in the text."""

    @property
    def tokens(self) -> list[int]:
        """The fact as it stands in a text."""
        return self.key + self.value + self.end


class Language(ABC):
    """Maker of facts and filler."""

    @abstractmethod
    def fact(self, random: np.random.Generator) -> Fact:
        """Return a random fact."""

    @abstractmethod
    def filler(self, random: np.random.Generator, num_tokens: int) -> list[int]:
        """Return that many tokens without a fact."""


class English(Language):
    """Sentences such as `The number of kavelo is 48213.`, in everyday prose."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._end = tokenizer.encode(".")
        self._sentences = [tokenizer.encode(text) for text in SENTENCES]

    @classmethod
    def suits(cls, tokenizer: Tokenizer) -> bool:
        """Return whether a tokenizer has tokens for all of it, in whatever case and spacing."""
        text = "".join(SENTENCES) + "\nThe number 0123456789" + CONSONANTS + VOWELS
        try:
            decoded = tokenizer.decode(tokenizer.encode(text))
        except UserError:  # an alphabet without these letters
            return False
        return "".join(decoded.lower().split()) == "".join(text.lower().split())

    def fact(self, random: np.random.Generator) -> Fact:
        """See `Language.fact`."""
        letters = [str(random.choice(list(kind))) for kind in (CONSONANTS, VOWELS) * 3]
        number = int(random.integers(10_000, 100_000))
        key = self._tokenizer.encode(f"\nThe number of {''.join(letters)} is")
        return Fact(key, self._tokenizer.encode(f" {number}"), self._end)

    def filler(self, random: np.random.Generator, num_tokens: int) -> list[int]:
        """See `Language.filler`."""
        tokens: list[int] = []
        while len(tokens) < num_tokens:
            tokens += self._sentences[random.integers(len(self._sentences))]
        return tokens[:num_tokens]


class Symbols(Language):
    """Random tokens, where a tokenizer has none for English: a DNA's letters, for example.

    Raises UserError if it has fewer than two tokens with text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        sizes = tokenizer.bytes_per_token()
        self._tokens = np.flatnonzero(sizes)
        if len(self._tokens) < 2:
            raise UserError("tasks", message="needle and recall need two tokens with text")
        bits = math.log2(len(self._tokens))
        self._key_length = math.ceil(math.log2(KEY_CHOICES) / bits)
        self._value_length = math.ceil(math.log2(VALUE_CHOICES) / bits)

    def fact(self, random: np.random.Generator) -> Fact:
        """See `Language.fact`."""
        key = self.filler(random, self._key_length)
        return Fact(key, self.filler(random, self._value_length), [])

    def filler(self, random: np.random.Generator, num_tokens: int) -> list[int]:
        """See `Language.filler`."""
        tokens: list[int] = random.choice(self._tokens, num_tokens).tolist()
        return tokens


def language_of(tokenizer: Tokenizer) -> Language:
    """Return English, if the tokenizer has tokens for it, or else strings of its symbols."""
    return English(tokenizer) if English.suits(tokenizer) else Symbols(tokenizer)
