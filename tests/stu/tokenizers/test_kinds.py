"""Every kind of tokenizer: round trips, equality with its library, streaming, files."""

import json

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stu.tokenizers.vocabularies import KINDS, make

MARK = "\u2581"
"""The character that tokenizers of SentencePiece's kind keep for spaces."""
KEEP_MARK = ("sentencepiece", "llama")
LONG = 1_000_000
AWKWARD = [
    *("", " ", "  a  ", "\n\n\t", "\r\n", "a\r\n\r\n b", "a\0b\0", "\ufeffa", "e\u0301\u0302x"),
    *(
        "\uffff\ufffd",
        "👩‍👩‍👧👍🏽",
        "𝔘𝔫𝔦 \U0010ffff",
        "<s></s><unk><0x41>",
        "<|endoftext|>",
        "ǅ İ ß ﬁ",
    ),
    *(
        "<|begin_of_text|>x<|end_of_text|>",
        "1234567 ١٢٣ 中文字 don't DON'T I'LL",
        "\x1c\x85\u2028\u3000 ",
    ),
]
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=MARK))
words = st.text(st.sampled_from("ab d\n\t\r.'1/def return E\u0301é"))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind, tmp_path_factory):
    return make(kind, tmp_path_factory.mktemp("tokenizer") / kind)


@pytest.fixture(scope="module")
def library(kind, tokenizer):
    """Return functions of the kind's own library that encode a text and decode ids."""
    contents = tokenizer.files[tokenizer.file_name]
    if kind == "sentencepiece":
        model = sentencepiece.SentencePieceProcessor(model_proto=contents)
        return model.encode, model.decode
    if kind == "bytes":
        return lambda text: [*text.encode()], lambda ids: bytes(ids).decode()
    if kind in ("huggingface", "llama"):
        model = tokenizers.Tokenizer.from_str(contents.decode())
        model.encode_special_tokens = True
        return lambda text: model.encode(text, add_special_tokens=False).ids, model.decode
    described = json.loads(tokenizer.files["tokenizer.tiktoken.json"])
    ranks = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size - 1)}
    model = tiktoken.Encoding(
        kind,
        pat_str=described["pattern"],
        mergeable_ranks=ranks,
        special_tokens=described["special_tokens"],
    )
    return lambda text: model.encode(text, disallowed_special=()), model.decode


def check(tokenizer, library, text):
    encode, decode = library
    ids = tokenizer.encode(text)
    assert ids == encode(text)
    assert tokenizer.decode(ids) == text
    assert decode(ids) == text
    assert not {*ids} & {*tokenizer.control_tokens().values()}
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().removeprefix(" ") in (
        text,
        text.removeprefix(" "),
    )


@settings(max_examples=150, deadline=None)
@given(text=any_text | words)
def test_round_trip_and_equality_with_the_library(tokenizer, library, text):
    check(tokenizer, library, text)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text(tokenizer, library, text):
    check(tokenizer, library, text)


@pytest.mark.parametrize("text", ["a", "Ab", "中", "é", "x1", "-/"])
def test_a_megabyte_without_a_space(tokenizer, library, text):
    check(tokenizer, library, (text * LONG)[: LONG // len(text.encode())])
