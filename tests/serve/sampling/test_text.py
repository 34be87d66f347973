"""Text while it streams: whole characters, and nothing of a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.sampling.detokenizer import TextStream
from stu.tokenizer import train_bpe

ALPHABET = "ab \n\tü語😀"
"""Characters of one to four bytes, most of which are no token of their own."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_bpe(["abab aab bba abba\n" * 20], 275, path)


texts = st.text(st.sampled_from(ALPHABET), max_size=12)


def stream(tokenizer, prompt, tokens, stop_strings=()):
    """The pieces that come, one for each token up to a stop, and what is left at the end."""
    its, pieces = TextStream(tokenizer, prompt, stop_strings), []
    for token in tokens:
        pieces.append(its.append(token))
        if its.stopped:
            return pieces
    return [*pieces, its.finish()]


@given(prompt=texts, text=texts)
@settings(max_examples=100, deadline=None)
def test_pieces_are_whole_characters_and_add_up(tokenizer, prompt, text):
    tokens = tokenizer.encode(text)
    pieces = stream(tokenizer, tokenizer.encode(prompt), tokens)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    # Nothing is held back but the beginning of a character.
    for count in range(len(tokens) + 1):
        known = tokenizer.decode(tokens[:count])
        assert "".join(pieces[:count]) == known.rstrip("\ufffd")


@given(
    text=st.text(st.sampled_from("abü\n"), max_size=14),
    stop_strings=st.lists(st.text(st.sampled_from("abü\n"), min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_nothing_of_a_stop_string_is_shown(tokenizer, text, stop_strings):
    """However its characters are spread over tokens, and whatever it shares with others."""
    tokens = tokenizer.encode(text)
    pieces = stream(tokenizer, [], tokens, stop_strings)
    # It stops at the first token with which a stop string is complete, before the one that starts
    # first: a longer one that began earlier may still have been open.
    for count in range(1, len(tokens) + 1):
        known = tokenizer.decode(tokens[:count]).rstrip("\ufffd")
        found = [at for stop in stop_strings if (at := known.find(stop)) >= 0]
        if found:
            assert "".join(pieces) == known[: min(found)]
            assert len(pieces) == count
            return
    assert "".join(pieces) == text


@given(
    text=st.text(st.sampled_from("abü\n"), min_size=1, max_size=14),
    stop=st.text(st.sampled_from("abü"), min_size=1, max_size=3),
    least=st.integers(0, 6),
)
@settings(max_examples=200, deadline=None)
def test_stop_strings_are_looked_for_after_the_fewest_tokens(tokenizer, text, stop, least):
    tokens = tokenizer.encode(text)
    its, found = TextStream(tokenizer, (), [stop], least), ""
    early = tokenizer.decode(tokens[:least]).rstrip("\ufffd")
    for token in tokens:
        found += its.append(token)
        if its.stopped:
            break
    assert found + its.finish() == early + text[len(early) :].split(stop)[0]


def test_bytes_that_never_become_a_character(tokenizer):
    """They come as U+FFFD as soon as that is certain, as Python decodes them."""
    euro = tokenizer.encode("€")  # three bytes
    assert len(euro) == 3
    tokens = [*euro[1:], *euro[:2], *tokenizer.encode("a"), *euro, euro[0]]
    pieces = stream(tokenizer, [], tokens)
    assert "".join(pieces) == b"\x82\xac\xe2\x82a\xe2\x82\xac\xe2".decode(errors="replace")
    assert pieces[4] == "\ufffda"


def test_a_character_that_the_prompt_begins_is_the_completion_s(tokenizer):
    prompt, last = tokenizer.encode("ab€")[:-1], tokenizer.encode("ab€")[-1]
    assert stream(tokenizer, prompt, [last]) == ["€", ""]
    assert stream(tokenizer, prompt, tokenizer.encode("a")) == ["\ufffda", ""]


def test_a_stop_string_may_be_complete_at_the_end_only(tokenizer):
    broken = tokenizer.encode("€")[0]
    a = tokenizer.encode("a")[0]
    assert "".join(stream(tokenizer, [], [a, a, broken], ["aab", "a\ufffd"])) == "a"
