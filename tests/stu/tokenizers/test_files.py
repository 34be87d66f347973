"""Files of tokenizers: which kind they are, what they leave open, and what is refused."""

import base64
import json

import pytest
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from stu.common.errors import UserError
from stu.tokenizer import MOST_UNUSED, make_tokenizer, read_tokenizer
from stu.tokenizers import tiktoken_ranks
from stu.tokenizers.alphabet import alphabet_files, bytes_files
from stu.tokenizers.hugging_face import train_byte_level_bpe
from stu.tokenizers.tiktoken_ranks import END, LAYOUTS, settings_file
from tests.stu.tokenizers.vocabularies import make

BYTES = {bytes([byte]): byte for byte in range(256)}
DNA = alphabet_files("ACGTN")["alphabet.json"]
TEXTS = ["def f(x):\n\treturn x + 1  # número\n" * 20, "the quick brown fox jumps over the dog\n"]


def ranks_file(ranks):
    lines = [base64.b64encode(symbol) + b" %d\n" % rank for symbol, rank in ranks.items()]
    return b"".join(lines)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make("huggingface", tmp_path_factory.mktemp("tokenizer") / "trained")


def write_json(trained, folder, changes, config=None):
    """Write a changed tokenizer.json, and a tokenizer_config.json if there is a config."""
    values = json.loads(trained.files["tokenizer.json"]) | changes
    (folder / "tokenizer.json").write_text(json.dumps(values))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_those_of_tiktoken(layout, monkeypatch, tmp_path):
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: BYTES)
    theirs = getattr(tiktoken_ext.openai_public, layout)()
    ours = LAYOUTS[layout]
    assert ours["pattern"] == theirs["pat_str"]
    assert ours["special_tokens"] == theirs["special_tokens"]
    (tmp_path / f"{layout}.tiktoken").write_bytes(ranks_file(BYTES))
    tokenizer = read_tokenizer(tmp_path / f"{layout}.tiktoken")
    encoding = tiktoken.Encoding(**theirs)
    assert tokenizer.vocab_size == encoding.n_vocab
    assert tokenizer.bos_id == tokenizer.eos_id == encoding.eot_token
    assert tokenizer.control_tokens() == theirs["special_tokens"]
    assert tokenizer.token_text(256) == "<unused 256>"
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match=r"has none of tokenizer\.model"):
        read_tokenizer(tmp_path / "..")
    assert read_tokenizer(tmp_path).sha256 == tokenizer.sha256


def test_published_models_have_more_rows_than_o200k_base_has_tokens(tmp_path):
    (tmp_path / "o200k_base.tiktoken").write_bytes(ranks_file(BYTES))
    tokenizer = read_tokenizer(tmp_path / "o200k_base.tiktoken")
    checksum = tokenizer.sha256
    assert tokenizer.vocab_size == 200_019
    tokenizer.pad(200_064)
    assert tokenizer.vocab_size == 200_064
    assert (tokenizer.token_bytes(200_063), tokenizer.sha256) == (b"", checksum)
    assert tokenizer.decode([97, 200_063]) == "a"
    for size in (200_063, 200_064 + MOST_UNUSED + 1):
        with pytest.raises(UserError, match=f"has 200064 tokens and the model vocab_size={size}"):
            tokenizer.pad(size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("space", [" ", "\n", " \t\u3000\r"])
def test_long_white_space_does_not_break_tiktoken(tmp_path, layout, space):
    """The library fails on a million spaces, and nothing is lost where they are divided."""
    tokenizer = make(layout, tmp_path / layout)
    text = "a b" + (space * 1_500_000)[:1_500_000] + "c d"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_is_divided_in_long_white_space_alone(tmp_path, monkeypatch):
    tokenizer = make("o200k_base", tmp_path / "ranks")
    texts = ["a b" * 500, "-" * 999, "x" + " " * 99 + "y\n" + "中" * 500, " " * 100]
    whole = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(tiktoken_ranks, "MOST_SPACES", 100)
    assert [tokenizer.encode(text) for text in texts] == whole
    text = "x" + " \n" * 130 + "y"
    ids = tokenizer.encode(text)
    parts = (text[:101], text[101:201], text[201:])
    assert ids == [token for part in parts for token in tokenizer.encode(part)]


def test_kinds_are_found_by_name(tmp_path, trained):
    contents = trained.files["tokenizer.json"]
    (tmp_path / "mine.JSON").write_bytes(contents)
    assert read_tokenizer(tmp_path / "mine.JSON").vocab_size == trained.vocab_size
    (tmp_path / "alphabet.json").write_bytes(DNA)
    assert read_tokenizer(tmp_path).vocab_size == 7
    (tmp_path / "tokenizer.json").write_bytes(contents)
    message = r"tokenizer\.json, alphabet\.json: name one of .* or leave only that one in it"
    with pytest.raises(UserError, match=message):
        read_tokenizer(tmp_path)
    assert read_tokenizer(tmp_path / "alphabet.json").vocab_size == 7
    with pytest.raises(UserError, match="none: no such file"):
        read_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match=r"has none of tokenizer\.model"):
        make_tokenizer({"other": b""}, tmp_path)


@pytest.mark.parametrize("name", ["../x", "/x", "a/alphabet.json", ""])
def test_files_of_other_names_are_refused(name, tmp_path):
    """A checkpoint brings the names, and they would be written to."""
    with pytest.raises(UserError, match=r"it has a file named .* only alphabet\.json can belong"):
        make_tokenizer({"alphabet.json": DNA, name: b"{}"}, tmp_path)


NO_ADDED = {"added_tokens": [], "post_processor": None}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<|end_of_text|>", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        name: {"id": name, "ids": [i], "tokens": [name]}
        for i, name in enumerate(["<|begin_of_text|>", "<|end_of_text|>"])
    },
}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
ROBERTA = {
    "type": "RobertaProcessing",
    "sep": ["<|end_of_text|>", 1],
    "cls": ["<|begin_of_text|>", 0],
    "trim_offsets": True,
    "add_prefix_space": False,
}


NO_SPECIAL = TEMPLATE | {
    "special_tokens": {
        name: {"id": name, "ids": [97], "tokens": ["a"]} for name in TEMPLATE["special_tokens"]
    }
}


@pytest.mark.parametrize(
    ("processor", "config", "expected"),
    [
        (TEMPLATE, None, (0, 1)),
        (ROBERTA, None, (0, 1)),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, TEMPLATE]}, None, (0, 1)),
        (TEMPLATE, {"bos_token": "<|end_of_text|>"}, (1, 1)),
        (None, {"eos_token": {"content": "<|end_of_text|>"}}, (1, 1)),
        (None, {"bos_token": None, "eos_token": {"content": "<|end_of_text|>"}}, (-1, 1)),
        (TEMPLATE, {"bos_token": None}, (-1, 1)),
        (TEMPLATE, {"bos_token": "<|begin_of_text|>", "add_bos_token": False}, (-1, 1)),
        (TEMPLATE, {"add_bos_token": True, "eos_token": None}, (0, -1)),
        (TEMPLATE | {"single": TEMPLATE["single"][1:]}, None, (1, 1)),
        (TEMPLATE | {"single": TEMPLATE["single"][1:]}, {"add_bos_token": False}, (-1, 1)),
        (None, {"bos_token": "<|begin_of_text|>", "eos_token": None}, (0, -1)),
        (BYTE_LEVEL, {"chat_template": "anything"}, (-1, -1)),
    ],
)
def test_bos_and_eos_of_a_tokenizer_json(trained, tmp_path, processor, config, expected):
    folder = write_json(trained, tmp_path, {"post_processor": processor}, config)
    tokenizer = read_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected
    assert tokenizer.start_ids == [i for i in expected[:1] if i >= 0]
    assert tokenizer.encode_prompt("a") == tokenizer.start_ids + tokenizer.encode("a")
    (tmp_path / "again").mkdir()
    tokenizer.save(tmp_path / "again")
    again = read_tokenizer(tmp_path / "again")
    assert (again.bos_id, again.eos_id, again.sha256) == (*expected, tokenizer.sha256)


def test_settings_for_batches_and_added_tokens_of_a_tokenizer_json(trained, tmp_path):
    """Padding and truncation would change texts; an added token is text, unless it is special."""
    model = tokenizers.Tokenizer.from_str(trained.files["tokenizer.json"].decode())
    model.enable_truncation(3)
    model.enable_padding(length=50)
    model.add_tokens(["two words", "élève"])
    model.add_special_tokens(["<|user|>"])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path)
    size = trained.vocab_size
    assert tokenizer.encode("two words élève <|user|>")[:2] == [size, *trained.encode(" ")]
    for text in ("two wordsélève é", "<|user|> a b c d e f"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.control_tokens()["<|user|>"] == size + 2
    assert size + 2 not in tokenizer.encode("<|user|>")
    assert tokenizer.decode([size + 1, size + 2]) == "élève"


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"decoder": None}, None, r"its decoder \(none\) is not supported: ByteLevel, or"),
        (
            {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
            None,
            r"decoder \(WordPiece\)",
        ),
        (
            {"model": {"type": "WordLevel", "vocab": {"a": 4 * 10**9}, "unk_token": "a"}},
            None,
            "up to",
        ),
        (
            {"model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}, **NO_ADDED},
            None,
            "no tok",
        ),
        ({"model": {"type": "Future"}}, None, r"not a tokenizer\.json that tokenizers [0-9.]+ can"),
        (
            {},
            {"bos_token": "the"},
            r'bos_token of tokenizer_config\.json, or .* special tokens .*, not "the"',
        ),
        ({"post_processor": NO_SPECIAL}, None, r"the post-processor adds, must be .* not \"a\""),
        (
            {"post_processor": {"type": "RobertaProcessing"}},
            None,
            "post_processor is of an unknown",
        ),
        ({"post_processor": {"type": "Future"}}, None, "post_processor is of an unknown form: it"),
        ({"post_processor": "x"}, None, "post_processor is of an unknown form"),
        ({"post_processor": TEMPLATE | {"single": [5]}}, None, "post_processor is of an unknown"),
        (
            {"post_processor": TEMPLATE | {"single": TEMPLATE["single"][::2] * 2}},
            {"eos_token": None},
            "adds several tokens before a text, .* name one of them as bos_token",
        ),
        ({}, {"bos_token": 5}, r"tokenizer_config\.json: bos_token must be null, .* not 5"),
        ({}, ["a"], r"tokenizer_config\.json: a JSON object is needed"),
    ],
)
def test_unusable_tokenizer_json(trained, tmp_path, changes, config, message):
    with pytest.raises(UserError, match=message):
        read_tokenizer(write_json(trained, tmp_path, changes, config))


def test_metaspace(tmp_path):
    """A decoder of older files."""
    vocabulary = {"<s>": 0, "\u2581a": 1, "b": 2, "\u2581": 3}
    model = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<s>"))
    for scheme in ("always", "first", "never"):
        model.decoder = decoders.Metaspace(prepend_scheme=scheme)
        model.save(str(tmp_path / "tokenizer.json"))
        tokenizer = read_tokenizer(tmp_path)
        for ids in ([1, 2, 1], [3, 3, 2], [2, 1], []):
            assert tokenizer.decode(ids) == model.decode(ids)
        assert tokenizer.token_text(0) == "<s>"


def test_unigram(tmp_path):
    """A vocabulary as T5 has, whose unknown token has no text."""
    pieces = [("\u2581a", -1.0), ("b", -2.0), ("[?]", 0.0), ("\u2581", -3.0)]
    model = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode("ab bé a") == [0, 1, 3, 1, 2, 0]
    assert tokenizer.decode(tokenizer.encode("ab bé a")) == "ab b a"
    assert (tokenizer.token_bytes(2), tokenizer.token_text(2)) == (b"", "[?]")


WHOLE = ranks_file(BYTES)


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        (WHOLE + b"YWI= 256 \nYWI= 257\n", {}, "line 258: the token is empty or listed twice"),
        (WHOLE + b"\nYWI=\n", {}, "line 258: a token in Base64 and a number are needed"),
        (WHOLE + b"Y!I= 256\n", {}, "line 257: a token in Base64"),
        (WHOLE + b"YWI= -1\n", {}, "line 257: .* rank is negative"),
        (WHOLE + b"YWI= 4000000000\n", {}, "line 257: .* or above 16777215"),
        (WHOLE + b"YWI= 4294967296\n", {}, "line 257: .* or above 16777215"),
        (WHOLE[:100], {}, r"no token for byte \d+; not a whole ranks file"),
        (b"", {}, "no token for byte 0"),
        (WHOLE + b"YWI= 300\n", {}, r"tiktoken\.json: two tokens have the same id"),
        (WHOLE, {"pattern": "("}, r"tiktoken\.json: pattern is not an expression"),
        (WHOLE, {"pattern": None}, r"tiktoken\.json: pattern must be an expression"),
        (WHOLE, {"special_tokens": {END: 2**40}}, "special_tokens must be an object of ids"),
        (WHOLE, {"special_tokens": [END]}, "special_tokens must be an object of ids"),
        (WHOLE, {"eos_token": "</s>"}, "eos_token must be null or one of special_tokens"),
    ],
)
def test_damaged_ranks(tmp_path, ranks, changes, message):
    settings = LAYOUTS["o200k_base"] | {"special_tokens": {END: 300}} | changes
    (tmp_path / "tokenizer.tiktoken").write_bytes(ranks)
    (tmp_path / "tokenizer.tiktoken.json").write_bytes(settings_file(settings))
    with pytest.raises(UserError, match=message):
        read_tokenizer(tmp_path)


def test_ranks_without_settings_need_a_known_name(tmp_path):
    (tmp_path / "mine.tiktoken").write_bytes(WHOLE)
    with pytest.raises(UserError, match=r"name it o200k_base\.tiktoken or cl100k_base\.tiktoken"):
        read_tokenizer(tmp_path / "mine.tiktoken")
    (tmp_path / "mine.tiktoken.json").write_bytes(settings_file(LAYOUTS["cl100k_base"]))
    assert read_tokenizer(tmp_path / "mine.tiktoken").eos_id == 100257


def test_published_ranks_are_found_in_a_folder(tmp_path):
    (tmp_path / "o200k_base.tiktoken").write_bytes(WHOLE)
    assert read_tokenizer(tmp_path).eos_id == 199_999
    (tmp_path / "cl100k_base.tiktoken").write_bytes(WHOLE)
    with pytest.raises(UserError, match=r"has cl100k_base\.tiktoken, o200k_base\.tiktoken: name"):
        read_tokenizer(tmp_path)
    (tmp_path / "alphabet.json").write_bytes(DNA)
    assert read_tokenizer(tmp_path).vocab_size == 7


def test_alphabets(tmp_path):
    dna = make("ACGTN", tmp_path / "dna")
    assert dna.encode("GATTACAN") == [2, 0, 3, 3, 0, 1, 0, 4]
    assert dna.decode([5, 2, 0, 6]) == "GA"
    assert (dna.bos_id, dna.eos_id, dna.vocab_size) == (5, 6, 7)
    for text, place in [("GAxT", 3), ("GAT\n", 4), ("é", 1), ("GA\U0001f600", 3), ("\0", 1)]:
        with pytest.raises(
            UserError, match=rf"\(number {place}, in .*\) is not in the alphabet .*ACGTN"
        ):
            dna.encode(text)
    with pytest.raises(UserError, match="alphabet is not allowed: it has half of a surrogate"):
        make_tokenizer(alphabet_files("A\udcff"), tmp_path)
    letters = make("añ東👍\n", tmp_path / "letters")
    text = "👍a東\nñ" * 9
    assert letters.decode(letters.encode(text)) == text
    assert dna.sha256 != letters.sha256
    assert make_tokenizer(bytes_files(), tmp_path).encode("é") == [0xC3, 0xA9]


def test_an_alphabet_with_an_unknown_token_and_ids_of_another_model(tmp_path):
    values = {
        "alphabet": {"A": 7, "C": 8, "G": 9, "T": 10, "N": 11},
        "special_tokens": {"[CLS]": 0, "[SEP]": 1, "[UNK]": 6},
        "bos_token": None,
        "eos_token": "[SEP]",
        "unknown_token": "[UNK]",
    }
    (tmp_path / "alphabet.json").write_text(json.dumps(values))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode_prompt("ACxN") == [7, 8, 6, 11]
    assert (tokenizer.bos_id, tokenizer.start_ids, tokenizer.end_ids) == (-1, [], [1])
    assert tokenizer.decode([7, 6, 1, 11]) == "AN"
    assert [tokenizer.token_text(token) for token in (1, 2, 7)] == ["[SEP]", "<unused 2>", "A"]
    del values["bos_token"]  # not mentioned: EOS takes its place
    (tmp_path / "alphabet.json").write_text(json.dumps(values))
    assert read_tokenizer(tmp_path).start_ids == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alphabet": {"AB": 0}}, "alphabet must be .* an id for each character"),
        ({"alphabet": {}}, "alphabet must be"),
        ({"alphabet": {"A": True}}, "alphabet must be an object of ids by token"),
        (
            {"alphabet": {"A": 0, "\ud800": 1}},
            "alphabet is not allowed: it has half of a surrogate",
        ),
        ({"special_tokens": {"\udc00": 9}}, "special_tokens is not allowed: it has half of a sur"),
        ({"alphabet": {"A": 5}}, "two tokens have the same id"),
        ({"alphabet": "bytes"}, "two tokens have the same id"),
        ({"unknown_token": "A"}, "unknown_token must be null or one of"),
        ({"bos_token": 1}, "bos_token must be null or one of"),
    ],
)
def test_wrong_alphabets(tmp_path, changes, message):
    (tmp_path / "alphabet.json").write_text(json.dumps(json.loads(DNA) | changes))
    with pytest.raises(UserError, match=message):
        read_tokenizer(tmp_path)
    (tmp_path / "alphabet.json").write_bytes(b"{")
    with pytest.raises(UserError, match=r"alphabet\.json: not JSON"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(("size", "limit"), [(257, "smallest"), (50_000, "largest")])
def test_a_byte_level_vocabulary_of_the_wrong_size_names_one_that_works(tmp_path, size, limit):
    with pytest.raises(UserError, match=f"vocab_size {size} .* the {limit} that") as caught:
        train_byte_level_bpe(TEXTS, size, tmp_path)
    assert not list(tmp_path.iterdir())
    named = int(str(caught.value).split()[-1])
    assert train_byte_level_bpe(TEXTS, named, tmp_path).vocab_size == named


@pytest.mark.parametrize("texts", [[], [""]])
def test_training_byte_level_bpe_without_text_is_refused(tmp_path, texts):
    with pytest.raises(UserError, match="no text"):
        train_byte_level_bpe(texts, 300, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["tokenizers", "tiktoken"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, package, trained):
    kind = {"tokenizers": "huggingface", "tiktoken": "cl100k_base"}[package]
    make(kind, tmp_path / kind)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=rf"{package} is not installed: run pip install '\.\[tok"):
        read_tokenizer(tmp_path / kind)
