"""Lists of sources: errors that name source, field and file, and what becomes of each source."""

import json
import re

import pytest
import yaml

from stu.common.errors import UserError
from stu.tokenizer import find_tokenizer, read_tokenizer
from tests.train.token_shards import read_tokens
from train.data import prepare_mixture
from train.data.cli import main
from train.data.config import PrepareConfig
from train.data.mixture import open_sources
from train.data.prepare import prepare_part
from train.data.prepare_mixture import prepare_mixture_part
from train.data.shards import TokenShards
from train.data.source_list import read_source_list

QUICK = ["--vocab-size=300", "--validation-fraction=0.3", "--workers=1"]


def text(word, number):
    return f"{word} {number}: the quick brown fox {number * number} jumps\n"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "books").mkdir()
    for number in range(30):
        (folder / "books" / f"{number}.txt").write_text(text("book", number))
    rows = [json.dumps({"id": i, "body": text("code", i)}) + "\n" for i in range(40)]
    (folder / "code-0.jsonl").write_text("".join(rows[:20]))
    (folder / "code-1.jsonl").write_text("".join(rows[20:]))
    (folder / "held.csv").write_text("text\n" + "".join(f"held out {i}\n" for i in range(9)))
    (folder / "few.txt").write_text("zyzzyva " * 4)
    return folder


def write_list(path, rows):
    path.write_text(yaml.safe_dump(rows))
    return path


def rows_of(corpora):
    return [
        {"name": "books", "path": str(corpora / "books"), "weight": 3},
        {"name": "code", "path": [f"{corpora}/code-*.jsonl"], "text_key": "body", "weight": 0.5},
        {
            "name": "held-out",
            "path": str(corpora / "held.csv"),
            "weight": 0,
            "validation_fraction": 1,
        },
        {"name": "few", "path": [str(corpora / "few.txt")], "validation_fraction": 0},
    ]


def prepared(path, output, *more):
    return main([str(path), "--output", str(output), *QUICK, *more])


def documents(folder, split):
    shards, tokenizer = TokenShards(folder, split), read_tokenizer(find_tokenizer(folder))
    tokens = shards.read(0, len(shards)).tolist()
    texts = tokenizer.decode([i for i in tokens if i != tokenizer.bos_id])
    assert tokens.count(tokenizer.bos_id) == shards.split.num_documents
    return texts, shards.split.num_documents


def test_each_source_becomes_a_folder(corpora, tmp_path, capsys):
    path = write_list(tmp_path / "sources.yaml", rows_of(corpora))
    assert prepared(path, tmp_path / "data") == 0
    printed = capsys.readouterr().out
    assert "source code, weight 0.5\ntrain: " in printed
    assert f"wrote {tmp_path / 'data'}" in printed
    sources = {source.name: source for source in open_sources(tmp_path / "data")}
    assert {name: source.weight for name, source in sources.items()} == {
        "books": 3.0,
        "code": 0.5,
        "held-out": 0.0,
        "few": 1.0,
    }
    fractions = {name: source.train.index.validation_fraction for name, source in sources.items()}
    assert fractions == {"books": 0.3, "code": 0.3, "held-out": 1, "few": 0}
    assert documents(tmp_path / "data" / "held-out", "validation")[1] == 9
    assert len(sources["held-out"].train) == 0
    assert documents(tmp_path / "data" / "few", "train") == ("zyzzyva " * 4, 1)
    assert len(sources["few"].validation) == 0
    found, count = documents(tmp_path / "data" / "code", "train")
    in_order = [text("code", i) for i in range(40) if text("code", i) in found]
    assert found == "".join(in_order)
    assert 20 <= count == len(in_order) < 40
    # A source alone is a folder of token shards like any other, and the tokenizer is that of all.
    assert len({source.train.index.tokenizer_sha256 for source in sources.values()}) == 1
    tokenizer = read_tokenizer(tmp_path / "data")
    assert tokenizer.sha256 == sources["few"].train.index.tokenizer_sha256


@pytest.mark.parametrize("given", [pytest.param(True, marks=pytest.mark.slow), False])
def test_parts_make_the_same_mixture(corpora, tmp_path, given, capsys):
    path = write_list(tmp_path / "sources.yaml", rows_of(corpora))
    more = [f"--tokenizer={tmp_path / 'whole'}"] if given else []
    assert prepared(path, tmp_path / "whole") == 0
    for part in ("1/3", "0/3", "2/3"):
        assert not (tmp_path / "parts" / "mixture.json").exists()
        assert prepared(path, tmp_path / "parts", f"--part={part}", *more) == 0
    assert "parts still missing: 1" in capsys.readouterr().out
    for row in rows_of(corpora):
        whole, parts = (read_tokens(tmp_path / made / row["name"]) for made in ("whole", "parts"))
        assert whole == parts
    for name in ("mixture.json", "tokenizer.model"):
        files = [tmp_path / folder / name for folder in ("whole", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert prepared(path, tmp_path / "parts", "--part=0/3", *more) == 0  # it is there
    rows = rows_of(corpora)
    write_list(path, [{**rows[0], "weight": 4}, *rows[1:]])
    assert prepared(path, tmp_path / "parts", "--part=0/3", *more) == 2
    assert re.search("sources .*'books': 4.*was made with", capsys.readouterr().err)


def test_runs_that_complete_sources_in_turn_complete_the_mixture(corpora, tmp_path, monkeypatch):
    """Each run misses a part of one source, and neither sees all sources complete in its turn."""
    path = write_list(tmp_path / "sources.yaml", rows_of(corpora)[:2])
    settings = {"tokenizer": "bytes", "validation_fraction": 0.3, "workers": 1}
    runs = [
        PrepareConfig([str(path)], tmp_path / "parts", part=f"{part}/2", **settings)
        for part in (0, 1)
    ]
    results = []

    def prepare_in_turn(source):
        if (source.name, source.part) == ("code", "0/2"):  # the first run has its part of "books"
            results.append(prepare_mixture_part(runs[1]))
        return prepare_part(source)

    monkeypatch.setattr(prepare_mixture, "prepare_part", prepare_in_turn)
    results.append(prepare_mixture_part(runs[0]))
    assert results == [[0], []]
    assert [source.name for source in open_sources(tmp_path / "parts")] == ["books", "code"]


def test_a_source_has_its_share_of_the_text_for_the_tokenizer(corpora, tmp_path, monkeypatch):
    """However large it is, and a source without weight has none."""
    from train.data import tokenizer

    trained = []

    def spy(texts, vocab_size, path):
        trained.extend(texts)
        raise UserError(message="stop here")

    monkeypatch.setattr(tokenizer, "train_bpe", spy)
    monkeypatch.setattr(tokenizer, "TOKENIZER_SAMPLE_BYTES", 1000)
    rows = rows_of(corpora)
    path = write_list(tmp_path / "sources.yaml", [{**rows[0], "weight": 1}, rows[1], rows[2]])
    assert prepared(path, tmp_path / "data") == 2
    sizes = {
        word: sum(len(t.encode()) for t in trained if t.startswith(word))
        for word in ("book", "code", "held")
    }
    assert 600 < sizes["book"] <= 667
    assert 270 < sizes["code"] <= 333
    assert sizes["held"] == 0
    assert not (tmp_path / "data").exists()


GOOD = {"name": "a", "path": "x.txt"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("- [", r"sources\.yaml: not YAML"),
        ("", r"sources\.yaml: expected a list of sources"),
        ({"name": "a", "path": "x"}, "expected a list of sources, each with `name` and `path`"),
        (["x.txt"], r"source 1: expected `name` and `path`, not 'x\.txt'"),
        ([{"path": "x.txt"}], "source 1: no `name`"),
        ([GOOD, {"name": "b"}], r"sources\.yaml: source b: no `path`"),
        ([{**GOOD, "wieght": 2}], "source a: no field 'wieght': did you mean 'weight'"),
        ([{**GOOD, "name": "a/b"}], 'source a/b: name="a/b" .* letters, digits'),
        ([{**GOOD, "name": ""}], 'source 1: name="" .* letters, digits'),
        ([{**GOOD, "name": 5}], "source 1: name=5 .* letters, digits"),
        ([{**GOOD, "path": []}], r"source a: path=\[\] .* a file, a folder"),
        ([{**GOOD, "path": [3]}], r"source a: path=\[3\] .* a file, a folder"),
        ([{**GOOD, "weight": -1}], "source a: weight=-1 .* a number >= 0"),
        ([{**GOOD, "weight": "2"}], 'source a: weight="2" .* a number >= 0'),
        ([{**GOOD, "weight": float("nan")}], "source a: weight=NaN .* a number >= 0"),
        ([{**GOOD, "weight": 0}], r"sources\.yaml: the weight of every source is 0"),
        ([GOOD, {**GOOD, "name": "A"}], "source A: another source has that name"),
        ([{**GOOD, "text_key": 1}], "source a: text_key=1 .* a string"),
        ([{**GOOD, "validation_fraction": 1.5}], "source a: validation_fraction=1.5 .* between"),
        ([{**GOOD, "validation_fraction": 1}], "source a: validation_fraction=1 .* less than 1"),
    ],
)
def test_errors_name_source_and_field(tmp_path, rows, message):
    path = tmp_path / "sources.yaml"
    path.write_text(rows if isinstance(rows, str) else yaml.safe_dump(rows))
    with pytest.raises(UserError, match=message):
        read_source_list(PrepareConfig([str(path)], tmp_path / "data"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "none.txt"}, "source code: source none.txt: no such file"),
        ({"text_key": "bdoy"}, r"source code: .*code-0\.jsonl line 1: no field 'bdoy'"),
        ({"path": "held.csv", "text_key": "x"}, r"source code: .*held\.csv line 1: 0 fields 'x'"),
        ({"path": "empty.jsonl"}, r"source code: no text in .*empty\.jsonl: every document is em"),
        (
            {"validation_fraction": 1e-9},
            "source code: the validation split got none of 40 documents",
        ),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_errors_in_a_source_leave_nothing(
    corpora, tmp_path, monkeypatch, capsys, changes, message, given
):
    monkeypatch.chdir(corpora)
    (corpora / "empty.jsonl").write_text("\n\n")
    rows = rows_of(corpora)
    path = write_list(tmp_path / "sources.yaml", [rows[0], {**rows[1], **changes}])
    assert prepared(path, tmp_path / "data", *(["--tokenizer=bytes"] if given else [])) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [file.name for file in tmp_path.iterdir()] == ["sources.yaml"]


def test_a_list_is_alone(tmp_path, capsys):
    assert main(["a.yaml", "b.txt", f"--output={tmp_path}"]) == 2
    assert "a.yaml: a list of sources must be the only SOURCE" in capsys.readouterr().err
    assert main(["none.yaml", f"--output={tmp_path}"]) == 2
    assert "none.yaml: " in capsys.readouterr().err
