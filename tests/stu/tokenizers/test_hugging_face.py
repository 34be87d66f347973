"""A tokenizer.json: text that looks like its tokens, text that it does not know."""

import itertools
import json
import random

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from stu.common.errors import UserError
from stu.tokenizer import read_tokenizer

MARK = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA_STEPS = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
CONTROL = ["<s>", "</s>", "<extra_id_0>", "a.b|(c", "::"]


@pytest.fixture
def saved(tmp_path):
    """Call with a tokenizer of the library and a decoder: the tokenizer of its file."""

    def call(library, decoder, special=(), **changes):
        library.decoder = decoder
        library.add_special_tokens([AddedToken(name) for name in special])
        described = json.loads(library.to_str())
        described["model"] |= changes
        (tmp_path / "tokenizer.json").write_text(json.dumps(described))
        return read_tokenizer(tmp_path)

    return call


def unigram():
    """A model as of T5 with bytes, whose control tokens are its most probable pieces."""
    letters = [(letter, -5.0) for letter in MARK + "abcs<>/0xA."]
    pieces = [("<unk>", 0.0), *((name, 0.0) for name in CONTROL), *((b, -8.0) for b in BYTES)]
    return tokenizers.Tokenizer(models.Unigram(pieces + letters, 0, byte_fallback=True))


@pytest.mark.parametrize("splits", [True, False])
def test_text_never_yields_control_tokens_or_bytes_of_a_unigram(saved, splits):
    library = unigram()
    if splits:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [*LLAMA_STEPS, decoders.Strip(" ", 1, 0)] if splits else LLAMA_STEPS
    tokenizer = saved(library, decoders.Sequence(steps), ["<unk>", *CONTROL])
    assert set(tokenizer.control_tokens()) == set(CONTROL)
    source, parts = random.Random(0), ["<", "/", ">", " ", "b", "é\n", "<unk>", *CONTROL, *BYTES]
    texts = [*parts, "<0x0A>", "</s></s>", "<<s>>", "x <0x41> y", "<0x4<0x41>1>", "a.a.b|(c"]
    texts += ["".join(source.choices(parts, k=20)) for _ in range(200)]
    control = {*tokenizer.control_tokens().values()}
    for text in texts:
        ids = tokenizer.encode(text)
        assert control.isdisjoint(ids)
        assert tokenizer.decode(ids) == (text.removeprefix(" ") if splits else text)
    free = "a b abc\n <a> é <s / 0x0A>"
    library.encode_special_tokens = True
    assert tokenizer.encode(free) == library.encode(free, add_special_tokens=False).ids


def test_text_never_yields_control_tokens_of_whole_words(saved):
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "a": 2, "[": 3, "CLS]": 4, MARK + "[CLS]": 5, MARK: 6}
    library = tokenizers.Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = saved(library, decoders.Metaspace(), ["[UNK]", "[CLS]"])
    assert tokenizer.control_tokens() == {"[CLS]": 1}
    assert tokenizer.encode("a [CLS] b [UNK]") == [2, 3, 4, 0, 3, 0]


@pytest.mark.parametrize("ignore_merges", [True, False])
def test_text_never_yields_control_tokens_of_a_bpe(saved, ignore_merges):
    """They are found in texts if merges make them, or if whole words are looked up."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        symbol: token for token, symbol in enumerate([*symbols, "<a", "<a>", "<b>", "ab"])
    }
    merges = [("<", "a"), ("<a", ">"), ("a", "b")]
    library = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = ["<a>", "<b>"]
    tokenizer = saved(library, decoders.ByteLevel(), special, ignore_merges=ignore_merges)
    for text in ("<a>", "<b>", "<a", "ab <a> <b>x", "<a><a>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert {vocabulary["<a>"], vocabulary["<b>"]}.isdisjoint(ids)
    assert tokenizer.encode("ab") == [vocabulary["ab"]]


def test_text_of_a_control_token_of_one_character_is_refused(saved):
    pieces = [("<unk>", 0.0), ("!", 0.0), ("a", -1.0)]
    library = tokenizers.Tokenizer(models.Unigram(pieces, 0))
    tokenizer = saved(library, decoders.Metaspace(), ["!"])
    assert tokenizer.encode("aa") == [2, 2]
    with pytest.raises(UserError, match='for its control token "!": leave it out'):
        tokenizer.encode("ab!")


@pytest.mark.parametrize("model", ["WordLevel", "Unigram"])
def test_text_that_a_model_has_no_tokens_for_is_the_users_error(saved, model):
    models_of = {
        "WordLevel": models.WordLevel({"a": 0}, "[UNK]"),
        "Unigram": models.Unigram([("a", -1.0)], None),
    }
    library = tokenizers.Tokenizer(models_of[model])
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = saved(library, decoders.Metaspace())
    assert tokenizer.encode("a a") == [0, 0]
    with pytest.raises(UserError, match=r"no tokens for a part of the text \(.*leave it out"):
        tokenizer.encode("a b")


@pytest.mark.parametrize("byte", [0x0A, 0x80, 0xF4])
def test_a_bpe_that_would_leave_out_text_is_refused(saved, byte):
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    of_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    character = "\U0010ffff" if byte == 0xF4 else {0x0A: "\n", 0x80: "\u0080"}[byte]
    ((written, _),) = of_byte.pre_tokenize_str(character)
    symbols.remove(written[0 if byte == 0xF4 else -1])
    library = tokenizers.Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, []))
    library.pre_tokenizer = of_byte
    with pytest.raises(UserError, match=f"no token for byte 0x{byte:02x} and no unk_token"):
        saved(library, decoders.ByteLevel())
    assert saved(library, decoders.ByteLevel(), unk_token="a").encode("a") == [symbols.index("a")]


def test_a_bpe_with_bytes_that_it_does_not_use_is_refused(saved):
    symbols = [chr(byte) for byte in range(0x80)] + BYTES
    library = tokenizers.Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, []))
    decoder = decoders.Sequence(LLAMA_STEPS)
    with pytest.raises(UserError, match="no token for byte 0x80"):
        saved(library, decoder)
    tokenizer = saved(library, decoder, byte_fallback=True)
    assert tokenizer.decode(tokenizer.encode("a é\n")) == "a é\n"


def test_a_bpe_that_draws_its_merges_is_refused(saved):
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, []))
    with pytest.raises(UserError, match=r"dropout=0\.1, .* set it to null"):
        saved(library, decoders.ByteLevel(), dropout=0.1)
    assert saved(library, decoders.ByteLevel(), dropout=None).vocab_size == 256


STEPS = {
    "replace": decoders.Replace(MARK, " "),
    "other": decoders.Replace("<", "("),
    "marks": decoders.Metaspace(prepend_scheme="never"),
    "bytes": decoders.ByteFallback(),
    "fuse": decoders.Fuse(),
    "strip": decoders.Strip(" ", 1, 0),
}


def test_decoders_decode_as_the_library_or_are_refused(saved):
    """Every order of up to five steps."""
    pieces = [MARK + "a", "b", MARK, "<", "ab" + MARK, " ", "<s>", *BYTES]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<s>", byte_fallback=True))
    source = random.Random(0)
    mark = [vocabulary[f"<0x{byte:02X}>"] for byte in MARK.encode()]
    texts = [source.choices([0, 1, 2, 3, 4, 5], k=6) + mark + [1, 2] for _ in range(20)]
    texts += [[2, 0, 1], [0], [vocabulary["<0x20>"], 1], [5, 1, 5, 0], [*mark, 1]]
    taken, refusals = set(), []
    for count in range(1, 6):
        for names in itertools.permutations(STEPS, count):
            steps = [STEPS[name] for name in names]
            try:
                tokenizer = saved(library, decoders.Sequence(steps))
            except UserError as error:
                refusals.append(str(error))
                continue
            taken.add(names)
            for ids in texts:
                assert tokenizer.decode(ids) == library.decode(ids)
    assert ("replace", "bytes", "fuse", "strip") in taken
    assert ("marks",) in taken
    refused = [("replace", "strip"), ("replace", "strip", "fuse"), ("fuse", "replace")]
    refused += [("bytes", "replace"), ("replace", "fuse", "bytes"), ("fuse", "marks")]
    assert taken.isdisjoint(refused)
    assert all("is not supported" in reason for reason in refusals)
