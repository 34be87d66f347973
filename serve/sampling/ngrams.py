"""Guesses of the next tokens from the text itself, without a second model.

Where the last tokens occurred before, the ones that followed there are guessed to follow again
(prompt lookup decoding: Saxena 2023; Yang et al. 2023, arXiv:2304.04487).
"""

from collections.abc import Sequence

import numpy as np

LEAST_EQUAL, MOST_EQUAL = 3, 8
"""Tokens before a place that must be those at the end of the text, at least, and that are compared,
at most."""
MOST_SEARCHED = 2**16
"""Tokens at the end of the text that are searched, which takes tens of microseconds."""
FIRST_MEAN, WORTHWHILE = 1.25, 1.0
"""Right guesses of a step, on average: as assumed at first, and at least for guessing to go on. A
step of several tokens takes up to twice as long as one of a single token."""
SHORTEST_PAUSE, LONGEST_PAUSE = 8, 64
"""Tokens for which guessing pauses when it was not worthwhile. Each pause in a row is twice as long
as the one before."""


class Ngrams:
    """Guesses the next tokens of one text, as long as they are right often enough.

    Args:
        tokens: Tokens of the text, which grows by `append`.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = np.array(tokens, dtype=np.int32)
        self._length = len(tokens)
        self._mean, self._pause, self._paused_until = FIRST_MEAN, SHORTEST_PAUSE, 0

    def __len__(self) -> int:
        """Return the number of tokens of the text."""
        return self._length

    def append(self, tokens: Sequence[int]) -> None:
        """Append the next tokens of the text."""
        length = self._length + len(tokens)
        if length > len(self._tokens):
            self._tokens = np.resize(self._tokens, 2 * length)
        self._tokens[self._length : length] = tokens
        self._length = length

    def guess(self, most: int) -> list[int]:
        """Return up to `most` next tokens: none where the text's last tokens are new, or guessing
        pauses."""
        if most < 1 or self._length < self._paused_until:
            return []
        text = self._tokens[max(0, self._length - MOST_SEARCHED) : self._length]
        last = len(text) - 1
        ends = np.flatnonzero(text[:last] == text[last])
        num_equal = 1
        while len(ends) and num_equal < MOST_EQUAL:
            longer = ends[ends >= num_equal]
            longer = longer[text[longer - num_equal] == text[last - num_equal]]
            if not len(longer):
                break
            ends, num_equal = longer, num_equal + 1
        if not len(ends) or num_equal < LEAST_EQUAL:
            return []
        after = text[ends[-1] + 1 :]  # what is guessed may go on where the text ends
        return [int(after[i % len(after)]) for i in range(most)]

    def learn(self, num_right: int) -> None:
        """Take note of how many guesses of a step were right, before their tokens are appended."""
        self._mean += (num_right - self._mean) / 4
        if self._mean >= WORTHWHILE:
            self._pause = SHORTEST_PAUSE
        else:
            self._paused_until = self._length + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
