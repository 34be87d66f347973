"""Every kind of tokenizer: round trips, equality with its library, streaming, files."""

import json
import random
import re

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.sampling.detokenizer import TextStream
from serve.sampling.grammar import Grammars
from serve.sampling_params import Constraint
from stu.tokenizer import make_tokenizer, read_tokenizer, tokenizer_files
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


@settings(max_examples=150, deadline=None)
@given(text=any_text | words)
def test_round_trip_and_equality_with_the_library(tokenizer, library, text):
    check(tokenizer, library, text)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text(tokenizer, library, text):
    check(tokenizer, library, text)


@pytest.mark.parametrize(
    "text",
    ["中", "x1", *(pytest.param(text, marks=pytest.mark.slow) for text in ("a", "Ab", "é", "-/"))],
)
def test_a_megabyte_without_a_space(tokenizer, library, text):
    check(tokenizer, library, (text * LONG)[: LONG // len(text.encode())])


@pytest.mark.parametrize("text", AWKWARD)
def test_streamed_text_equals_decoding_at_once_at_every_cut(tokenizer, text):
    """A prompt may end within a character, which then belongs to the completion."""
    ids = tokenizer.encode_prompt(text)
    whole = b"".join(map(tokenizer.token_bytes, ids)).decode()
    for cut in range(len(tokenizer.start_ids), len(ids) + 1):
        stream = TextStream(tokenizer, ids[:cut])
        pieces = [stream.append(token) for token in ids[cut:]] + [stream.finish()]
        before = b"".join(map(tokenizer.token_bytes, ids[:cut])).decode("utf-8", "ignore")
        assert before + "".join(pieces) == whole
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    assert tokenizer.decode(ids) == text in (whole, whole.removeprefix(" "))


def test_streamed_random_ids_equal_decoding_at_once(tokenizer, kind):
    """Ids that no text yields: broken characters, control tokens and unused ids in between."""
    tokenizer = read_tokenizer(tokenizer.path)
    tokenizer.pad(tokenizer.vocab_size + 5)
    generator = random.Random(0)
    for _ in range(300):
        ids = [generator.randrange(tokenizer.vocab_size) for _ in range(generator.randrange(12))]
        stream = TextStream(tokenizer, ())
        streamed = "".join([stream.append(token) for token in ids] + [stream.finish()])
        joined = b"".join(map(tokenizer.token_bytes, ids))
        assert streamed == joined.decode("utf-8", "replace")
        decoded = tokenizer.decode(ids)
        if kind == "sentencepiece":  # its library replaces each broken byte
            decoded, streamed = decoded.replace("\ufffd", ""), streamed.replace("\ufffd", "")
        elif kind == "llama":
            streamed = streamed.removeprefix(" ")
        assert decoded == streamed
    for outside in (-1, tokenizer.vocab_size):
        with pytest.raises(IndexError):
            tokenizer.decode([outside])


def test_tokens_and_their_bytes(tokenizer, kind):
    names = {token: name for name, token in tokenizer.control_tokens().items()}
    sizes = tokenizer.bytes_per_token()
    assert (sizes.shape, sizes.dtype) == ((tokenizer.vocab_size,), np.int64)
    assert {tokenizer.bos_id, tokenizer.eos_id} <= {*names}
    seen = set()
    for token in range(tokenizer.vocab_size):
        contents = tokenizer.token_bytes(token)
        assert len(contents) == sizes[token]
        shown = tokenizer.token_text(token)
        if token in names:
            assert (contents, shown) == (b"", names[token])
        elif not shown.startswith("bytes:"):
            assert shown.encode() == contents or shown == "<unk>"
        else:
            assert bytes.fromhex(shown.removeprefix("bytes:").replace("\\x", "")) == contents
        seen.add(contents)
    assert {bytes([byte]) for byte in range(256)} <= seen


def test_prompts_begin_as_documents_do(tokenizer, kind):
    ids = tokenizer.encode("a b")
    assert tokenizer.encode_prompt("a b") == [tokenizer.bos_id, *ids]
    assert tokenizer.start_ids == [tokenizer.bos_id]
    if kind in ("o200k_base", "cl100k_base"):  # one token between documents
        assert tokenizer.bos_id == tokenizer.eos_id
        assert tokenizer.end_ids == []
    else:
        assert tokenizer.end_ids == [tokenizer.eos_id]


def test_half_of_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("a\ud800")


def test_files_make_the_same_tokenizer_anywhere(tokenizer, kind, tmp_path):
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    again = read_tokenizer(tmp_path / "copy")
    assert tokenizer_files(tmp_path / "copy") == tokenizer_files(tokenizer.path) == tokenizer.files
    held = make_tokenizer(tokenizer.files, tmp_path)
    text = "def f(x):\n\treturn 'é'"
    for other in (again, held):
        assert other.sha256 == tokenizer.sha256
        assert other.encode_prompt(text) == tokenizer.encode_prompt(text)
        assert (other.eos_id, other.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)


def test_the_same_texts_train_the_same_tokenizer(tokenizer, kind, tmp_path):
    assert make(kind, tmp_path / kind).sha256 == tokenizer.sha256


@pytest.mark.parametrize("pattern", ["(東|dog a){3}", "[a-cé]{1,3} (x|👍)"])
def test_grammars_allow_all_that_matches_and_nothing_else(tokenizer, pattern):
    """Texts begin with no space, even where the tokenizer puts one before whole texts."""
    tokenizer = read_tokenizer(tokenizer.path, tokenizer.vocab_size + 3)
    grammars, generator, found = Grammars(tokenizer), random.Random(0), set()
    for _ in range(30):
        matcher, ids = grammars.matcher(Constraint("regex", pattern)), []
        while not ids or ids[-1] != tokenizer.eos_id:
            ids.append(
                generator.choice(matcher.allowed(tokenizer.vocab_size).nonzero()[:, 0].tolist())
            )
            matcher.append(ids[-1])
        found.add(b"".join(map(tokenizer.token_bytes, ids)).decode())
    assert all(re.fullmatch(pattern, text) for text in found)
    assert len(found) > 5
