"""Text while it streams: whole characters and no part of a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.sampling.detokenizer import TextStream
from stu.tokenizers.sentence_piece import train_bpe

ALPHABET = "ab \n\tü語😀"
"""Characters of one to four bytes; most take several tokens."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_bpe(["abab aab bba abba\n" * 20], 275, path)


texts = st.text(st.sampled_from(ALPHABET), max_size=12)


def stream(tokenizer, prompt, tokens, stop_strings=(), min_tokens=0):
    """Return the text after each token up to a stop, and the text that was held back."""
    text_stream, pieces = TextStream(tokenizer, prompt, stop_strings, min_tokens), []
    for token in tokens:
        pieces.append(text_stream.append(token))
        if text_stream.stopped:
            return pieces
    return [*pieces, text_stream.finish()]


@given(prompt=texts, text=texts)
@settings(max_examples=100, deadline=None)
def test_pieces_are_whole_characters_that_add_up_to_the_text(tokenizer, prompt, text):
    tokens = tokenizer.encode(text)
    pieces = stream(tokenizer, tokenizer.encode(prompt), tokens)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    # Only the beginning of a character is held back.
    for count in range(len(tokens) + 1):
        known = tokenizer.decode(tokens[:count])
        assert "".join(pieces[:count]) == known.rstrip("\ufffd")


@given(
    text=st.text(st.sampled_from("abü\n"), max_size=14),
    stop_strings=st.lists(st.text(st.sampled_from("abü\n"), min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_text_ends_before_a_stop_string(tokenizer, text, stop_strings):
    tokens = tokenizer.encode(text)
    pieces = stream(tokenizer, [], tokens, stop_strings)
    # It stops at the first token that completes a stop string, and is cut at the complete string
    # that starts first.
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
def test_stop_strings_are_searched_after_min_tokens(tokenizer, text, stop, least):
    tokens = tokenizer.encode(text)
    early = tokenizer.decode(tokens[:least]).rstrip("\ufffd")
    found = "".join(stream(tokenizer, (), tokens, [stop], least))
    assert found == early + text[len(early) :].split(stop)[0]


def test_bytes_that_are_not_utf8_become_replacement_characters_at_once(tokenizer):
    euro = tokenizer.encode("€")  # three bytes
    assert len(euro) == 3
    tokens = [*euro[1:], *euro[:2], *tokenizer.encode("a"), *euro, euro[0]]
    pieces = stream(tokenizer, [], tokens)
    assert "".join(pieces) == b"\x82\xac\xe2\x82a\xe2\x82\xac\xe2".decode(errors="replace")
    assert pieces[4] == "\ufffda"


def test_character_that_begins_in_the_prompt_belongs_to_the_completion(tokenizer):
    prompt, last = tokenizer.encode("ab€")[:-1], tokenizer.encode("ab€")[-1]
    assert stream(tokenizer, prompt, [last]) == ["€", ""]
    assert stream(tokenizer, prompt, tokenizer.encode("a")) == ["\ufffda", ""]


def test_stop_string_may_be_completed_by_the_end(tokenizer):
    broken = tokenizer.encode("€")[0]
    a = tokenizer.encode("a")[0]
    assert "".join(stream(tokenizer, [], [a, a, broken], ["aab", "a\ufffd"])) == "a"
