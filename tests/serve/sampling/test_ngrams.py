"""Guesses of next tokens against a search of all places."""

import random
from itertools import pairwise

import pytest

from serve.sampling.ngrams import (
    LEAST_EQUAL,
    LONGEST_PAUSE,
    MOST_EQUAL,
    SHORTEST_PAUSE,
    Ngrams,
)


def expected_guess(text, most):
    """The slow twin: try each earlier place, from the last on."""
    best = 0, 0
    for place in range(len(text) - 1, 0, -1):
        equal = 0
        while equal < min(place, MOST_EQUAL) and text[place - 1 - equal] == text[-1 - equal]:
            equal += 1
        if equal > best[0]:
            best = equal, place
    equal, place = best
    if equal < LEAST_EQUAL:
        return []
    longer = list(text)
    for _ in range(most):
        longer.append(longer[place])
        place += 1
    return longer[len(text) :]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 50])
def test_what_followed_the_longest_equal_end_is_guessed(num_tokens):
    choose = random.Random(num_tokens)
    for _ in range(300):
        text = [choose.randrange(num_tokens) for _ in range(choose.randrange(1, 60))]
        if num_tokens == 50:
            text += choose.choices([text[:9], [7, 8], []])[0]
        cut = choose.randrange(1, len(text) + 1)
        ngrams = Ngrams(text[:cut])
        for start in range(cut, len(text), 4):
            ngrams.append(text[start : min(start + 4, len(text))])
        assert len(ngrams) == len(text)
        most = choose.randrange(9)
        assert ngrams.guess(most) == expected_guess(text, most)


def test_a_period_is_guessed_beyond_the_end_of_the_text():
    assert Ngrams([1, 2, 1, 2, 1]).guess(5) == [2, 1, 2, 1, 2]
    assert Ngrams([1, 2, 3]).guess(5) == []


def test_wrong_guesses_pause_for_longer_and_longer():
    """A few tokens in a hundred at last; and right guesses end it."""
    ngrams, guessed = Ngrams([4] * 9), []
    for position in range(600):
        if ngrams.guess(7):
            guessed.append(position)
            ngrams.learn(0)
        ngrams.append([4])
    gaps = [later - earlier for earlier, later in pairwise(guessed)]
    assert gaps[:3] == [SHORTEST_PAUSE, 2 * SHORTEST_PAUSE, 4 * SHORTEST_PAUSE]
    assert set(gaps[3:]) == {LONGEST_PAUSE}
    while not ngrams.guess(7):
        ngrams.append([4])
    ngrams.learn(7)
    assert ngrams.guess(7)
