"""Round trips of the tokenizer, its training, and damaged files."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stu.common.errors import UserError
from stu.tokenizer import Tokenizer, read_tokenizer
from stu.tokenizers.sentence_piece import train_bpe

TEXTS = [
    "def f(x):\n\treturn x  # tab, two spaces\n\n    four = 'spaces'\r\n",
    "The quick brown fox jumps over the lazy dog; the dog sleeps on, and the fox goes home.\n",
    "Grüße aus München, élève, 東京の夜, привет мир.\n",
] * 20

# SentencePiece keeps U+2581 for itself: the one character that does not come back.
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))
ascii_text = st.text(st.sampled_from("ab d\n\t\r.def return"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe(TEXTS, 420, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@settings(max_examples=300, deadline=None)
@given(text=any_text | ascii_text)
def test_round_trip_and_bytes(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_per_token()[ids].sum() == len(text.encode())
    assert tokenizer.bos_id not in ids
    assert tokenizer.eos_id not in ids


@settings(max_examples=100, deadline=None)
@given(first=any_text | ascii_text, second=any_text | ascii_text)
def test_no_token_crosses_a_newline(tokenizer: Tokenizer, first: str, second: str) -> None:
    whole = tokenizer.encode(first + "\n" + second)
    assert whole == tokenizer.encode(first + "\n") + tokenizer.encode(second)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "  a  ", "\n\n\t", "\r\n"),
        *("a\0b", "\ufeffa", "e\u0301", "\uffff", "👩‍👩‍👧", "<0x41>"),
    ],
)
def test_round_trip_of_awkward_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_and_tokens_that_do_not_come_back(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("a\ud800")
    with pytest.raises(IndexError):
        tokenizer.decode([tokenizer.vocab_size])


def test_control_tokens(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode("\n\t") == [3, 4]
    text_that_looks_like_them = "<s></s><unk>"
    assert not {0, 1, 2} & set(tokenizer.encode(text_that_looks_like_them))
    assert tokenizer.decode([1, 0, *tokenizer.encode("fox"), 2]) == "fox"
    assert tokenizer.decode([]) == tokenizer.decode([0]) == ""
    sizes = tokenizer.bytes_per_token()
    assert sizes.shape == (tokenizer.vocab_size,) == (420,)
    assert sizes.dtype == np.int64
    assert (sizes[:3] == 0).all()
    assert (sizes[3:] > 0).all()


def test_tokens_are_shown_by_themselves(tokenizer: Tokenizer) -> None:
    shown = [tokenizer.token_text(token) for token in range(tokenizer.vocab_size)]
    assert shown[:5] == ["<unk>", "<s>", "</s>", "\n", "\t"]
    assert {"bytes:\\x80", "bytes:\\xff", "z", " "} <= set(shown)
    for token, text in enumerate(shown):
        if token > 2 and not text.startswith("bytes:"):
            assert tokenizer.decode([token]) == text


def test_training_is_deterministic(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = train_bpe(iter(TEXTS), 420, tmp_path / "again.model")
    assert again.files["tokenizer.model"] == tokenizer.files["tokenizer.model"]
    assert again.sha256 == tokenizer.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["again.model"]
    assert train_bpe(TEXTS, 400, tmp_path / "other.model").sha256 != tokenizer.sha256


def test_long_lines_are_learned_from(tmp_path: Path) -> None:
    one_line = " ".join(f"abracadabra{i % 7}" for i in range(2000))
    made = train_bpe([one_line], 300, tmp_path / "tokenizer.model")
    assert len(made.encode("abracadabra")) <= 2


@pytest.mark.parametrize(("vocab_size", "limit"), [(50_000, "largest"), (265, "smallest")])
def test_a_vocabulary_of_the_wrong_size_names_one_that_works(
    tmp_path: Path, vocab_size: int, limit: str
) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(UserError, match=f"vocab_size {vocab_size} .* the {limit} that") as caught:
        train_bpe(TEXTS, vocab_size, path)
    assert not list(tmp_path.iterdir())
    named = int(re.findall(r"\d+", str(caught.value))[-1])
    assert train_bpe(TEXTS, named, path).vocab_size == named


@pytest.mark.parametrize("texts", [[], [""], ["\n\n"]])
def test_training_without_text_is_refused(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(UserError, match="no text"):
        train_bpe(texts, 300, tmp_path / "tokenizer.model")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stu.common.files.fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        train_bpe(TEXTS, 400, tmp_path / "tokenizer.model")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_whole_model_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "broken.model"
    with pytest.raises(UserError, match=r"broken\.model: no such file"):
        read_tokenizer(path)
    for content in (
        b"",
        b"not a model",
        b"\x00" * 100,
        b"\n\x00",
        tokenizer.files["tokenizer.model"][:-100],
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"broken\.model: not a SentencePiece model"):
            read_tokenizer(path)
