"""From text to decoded text with each kind of tokenizer."""

import json
import random
import shutil

import numpy as np
import pytest

from serve import LLM, SamplingParams
from serve.sampling_params import Constraint
from stu.common.errors import UserError
from stu.model_dir import load_config, load_tokenizer
from stu.tokenizer import read_tokenizer
from stu.tokenizers.tiktoken_ranks import LAYOUTS, settings_file
from tests.stu.tokenizers.vocabularies import make
from train import module, report
from train.checkpoint import export, import_published
from train.data import cli as prepare
from train.data import encode
from train.data.shards import Index, TokenShards

WORDS = ["the", "dog", "sat", "on", "a", "mat", "and", "cat", "ran", "to", "it", "é", "東", "👍"]
LETTERS = "".join(sorted({*"".join(WORDS), " ", "\n"}))
GIVEN = ["llama", "o200k_base", "cl100k_base"]
"""Kinds that are given as a folder."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    source = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = ["\n".join(" ".join(source.choices(WORDS, k=8)) for _ in range(4)) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepared(corpus, tokenizer, output, *more):
    """Run stu-prepare with a `--tokenizer`, and return its folder."""
    arguments = [corpus, "--output", output, "--tokenizer", tokenizer, "--vocab-size", "280"]
    arguments += ["--validation-fraction", "0.2", "--workers", "1", *more]
    assert prepare.main([*map(str, arguments)]) == 0
    return output


def texts_of(corpus):
    return [json.loads(line)["text"] for line in corpus.read_text().splitlines()]


@pytest.mark.parametrize(
    "kind",
    [
        "huggingface",
        "bytes",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in (*GIVEN, f"characters:{LETTERS}")),
    ],
)
def test_from_text_to_text(corpus, kind, train, tmp_path):
    given = make(kind, tmp_path / "given").path.parent if kind in GIVEN else kind
    data = prepared(corpus, given, tmp_path / "data")
    tokenizer = read_tokenizer(data)
    validation = report.validation_documents(data)
    assert [text for text in texts_of(corpus) if text in validation] == validation
    index = Index.load(data)
    assert (index.vocab_size, index.tokenizer_sha256) == (tokenizer.vocab_size, tokenizer.sha256)
    again = prepared(corpus, data, tmp_path / "again")
    assert Index.load(again) == index

    padded = tokenizer.vocab_size + 3
    run = train(
        tmp_path / "run",
        f"--data.dir={data}",
        f"--model.config.vocab_size={padded}",
        "--model.config.max_seq_len=64",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
    )
    model = tmp_path / "model"
    assert export.main([str(run), "--output", str(model)]) == 0
    assert load_config(model).vocab_size == load_tokenizer(model).vocab_size == padded
    assert load_tokenizer(model).files == tokenizer.files

    llm = LLM(model, "cpu", cache_gib=0.1)
    params = SamplingParams(max_new_tokens=20, temperature=1.0, stop_at_eos=False)
    (answer,) = llm.generate("the 東", params, use_tqdm=False)
    assert [*answer.prompt_token_ids] == tokenizer.encode_prompt("the 東")
    chosen = answer.outputs[0]
    joined = b"".join(map(llm.tokenizer.token_bytes, chosen.token_ids))
    assert chosen.text == joined.decode("utf-8", "replace")
    again = llm.generate([[*answer.prompt_token_ids]], params, use_tqdm=False)[0].outputs[0]
    assert (again.token_ids, again.text) == (chosen.token_ids, chosen.text)

    constraint = Constraint("regex", "(東|dog a){3}")
    constrained = SamplingParams(max_new_tokens=40, temperature=1.0, constraint=constraint)
    text = llm.generate("the", constrained, use_tqdm=False)[0].outputs[0].text
    assert text.replace("dog a", "東") == "東東東"
    stopped = SamplingParams(max_new_tokens=40, constraint=constraint, stop=["g a", "東東"])
    text = llm.generate("the", stopped, use_tqdm=False)[0].outputs[0].text
    assert text in ("do", "", "東do")

    score, part = llm.score(["the cat", "the"], use_tqdm=False)
    assert score.num_bytes == 7
    assert score.num_tokens == len(tokenizer.encode("the cat"))
    if kind == "llama":
        with pytest.raises(UserError, match="it adds a space before them"):
            llm.score(["the"], [" cat"], use_tqdm=False)
    else:
        (rest,) = llm.score(["the"], [" cat"], use_tqdm=False)
        assert tokenizer.encode("the") + tokenizer.encode(" cat") == tokenizer.encode("the cat")
        assert rest.logprob + part.logprob == pytest.approx(score.logprob, rel=1e-4)

    assert export.main([str(run), "--output", str(tmp_path / "x"), "--format", "published"]) == 0
    arguments = [str(tmp_path / "x"), "--output", str(tmp_path / "y"), "--norm-eps", "1e-5"]
    assert import_published.main([*arguments, "--tokenizer", str(data)]) == 0
    assert load_tokenizer(tmp_path / "y").sha256 == tokenizer.sha256


@pytest.mark.parametrize("kind", ["huggingface", "o200k_base", "cl100k_base"])
def test_long_texts_are_divided_where_a_token_begins(kind, tmp_path, monkeypatch):
    tokenizer = make(kind, tmp_path / kind)
    blocks = ["def f(x):", "    return x.y /", "/ z // 3", "", "  ", "x = 1", "'é", "2 + 3,\r"]
    source = random.Random(0)
    text = "\n".join(source.choices(blocks, k=2000))
    whole = encode.encode_document(tokenizer, text)
    assert whole.tolist() == tokenizer.start_ids + tokenizer.encode(text) + tokenizer.end_ids
    for size in (200, 377, 5000):
        monkeypatch.setattr(encode, "PIECE_CHARS", size)
        assert encode.encode_document(tokenizer, text).tolist() == whole.tolist()
    monkeypatch.setattr(encode, "PIECE_CHARS", 5)  # where no line ends in reach: other tokens
    pieces = encode.encode_document(tokenizer, text).tolist()
    assert len(pieces) > len(whole)
    assert tokenizer.decode(pieces) == text


@pytest.mark.parametrize("tokenizer", ["huggingface", "bytes"])
def test_parts_have_the_tokens_of_the_whole(corpus, tokenizer, tmp_path):
    lines = corpus.read_text().splitlines(keepends=True)
    (tmp_path / "in").mkdir()
    for name, half in [("a", lines[:30]), ("b", lines[30:])]:
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(half))
    whole = prepared(tmp_path / "in", tokenizer, tmp_path / "whole")
    for part in (1, 0):
        prepared(tmp_path / "in", tokenizer, tmp_path / "parts", "--part", f"{part}/2")
    assert read_tokenizer(tmp_path / "parts").files == read_tokenizer(whole).files
    for split in ("train", "validation"):
        shards = [TokenShards(folder, split) for folder in (whole, tmp_path / "parts")]
        tokens = [shard.read(0, len(shard)).tolist() for shard in shards]
        assert tokens[0] == tokens[1]


def test_documents_are_divided_by_one_token_where_bos_and_eos_are_the_same(corpus, tmp_path):
    tokenizer = make("o200k_base", tmp_path / "ranks")
    data = prepared(corpus, tmp_path / "ranks", tmp_path / "data")
    for split in ("train", "validation"):
        shards = TokenShards(data, split)
        tokens = shards.read(0, len(shards))
        starts = np.flatnonzero(tokens == tokenizer.eos_id)
        assert len(starts) == shards.split.num_documents
        assert starts[0] == 0
        assert np.diff(starts).min() > 1


def test_documents_without_bos_end_with_eos(corpus, tmp_path):
    values = json.loads(make("bytes", tmp_path / "b").files["alphabet.json"])
    path = tmp_path / "alphabet.json"
    path.write_text(json.dumps(values | {"bos_token": None}))
    data = prepared(corpus, path, tmp_path / "data")
    validation = report.validation_documents(data)
    assert len(validation) > 3
    assert [text for text in texts_of(corpus) if text in validation] == validation
    path.write_text(json.dumps(values | {"bos_token": None, "eos_token": None}))
    with pytest.raises(UserError, match="with BOS or EOS, which mark documents"):
        prepare.prepare(prepare.PrepareConfig([str(corpus)], tmp_path / "x", tokenizer=path))


def test_ids_of_a_large_vocabulary_take_four_bytes(corpus, tmp_path):
    path = make("o200k_base", tmp_path / "ranks").path
    path.with_name("tokenizer.tiktoken.json").write_bytes(settings_file(LAYOUTS["o200k_base"]))
    index = Index.load(prepared(corpus, path.parent, tmp_path / "data"))
    assert (index.dtype, index.vocab_size) == ("uint32", 200_019)
    assert TokenShards(tmp_path / "data", "train").read(0, 1).tolist() == [199_999]
    copy = shutil.copy(path, tmp_path / "o200k_base.tiktoken")  # which says what the layout is
    again = Index.load(prepared(corpus, copy, tmp_path / "again"))
    assert again.tokenizer_sha256 == index.tokenizer_sha256


def test_checkpoints_from_when_sentencepiece_was_the_only_kind(train, data, tmp_path, monkeypatch):
    written = module.training_record

    def before(*arguments):
        record = written(*arguments)
        return record | {"tokenizer": record["tokenizer"]["tokenizer.model"]}

    monkeypatch.setattr(module, "training_record", before)
    run = train(tmp_path / "run", "--trainer.max_steps=1")
    assert export.main([str(run), "--output", str(tmp_path / "model")]) == 0
    assert load_tokenizer(tmp_path / "model").sha256 == read_tokenizer(data).sha256
    monkeypatch.undo()
    train(tmp_path / "run", "--trainer.max_steps=2", "--resume=last")


def test_a_checkpoint_cannot_write_outside_the_exported_folder(
    train, data, tmp_path, monkeypatch, capsys
):
    written = module.training_record

    def forged(*arguments):
        record = written(*arguments)
        (contents,) = record["tokenizer"].values()
        return record | {"tokenizer": {**record["tokenizer"], "../outside": contents}}

    monkeypatch.setattr(module, "training_record", forged)
    run = train(tmp_path / "run", "--trainer.max_steps=1")
    for layout in ("stu", "published"):
        arguments = [str(run), "--output", str(tmp_path / "out" / "model"), "--format", layout]
        assert export.main(arguments) == 2
        assert 'a file named "../outside"' in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*outside*")] == []


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("characters:", "characters: and different characters, such as characters:ACGTN"),
        ("characters:AA", "characters: and different characters"),
        ("characters:ACGT", "is not in the alphabet of the tokenizer"),
        ("none", "tokenizer none: no such file"),
    ],
)
def test_wrong_tokenizers_are_named(corpus, tmp_path, capsys, tokenizer, message):
    arguments = [str(corpus), "--output", str(tmp_path / "data"), "--tokenizer", tokenizer]
    assert prepare.main([*arguments, "--workers=1"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_document_with_a_foreign_character_is_named(tmp_path, capfd, workers, monkeypatch):
    monkeypatch.setattr(encode, "PIECE_CHARS", 4)
    texts = ["ACGT" * 3] * 30 + ["ACGTACGTGAx"] + ["ACGT" * 3] * 9
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "table.csv").write_text("text\n" + "".join(f"{text}\n" for text in texts))
    (tmp_path / "plain.txt").write_text("ACGTACGTGAx")
    reason = 'character "x" (number 11, in "ACGTACGTGAx") is not in the alphabet'
    for name, place in [("rows.jsonl", " line 31"), ("table.csv", " line 32"), ("plain.txt", "")]:
        sources = sorted({str(tmp_path / "rows2.jsonl"), str(tmp_path / name)})
        (tmp_path / "rows2.jsonl").write_text('{"text": "ACGT"}\n' * 30)
        arguments = ["--output", str(tmp_path / "data"), "--tokenizer=characters:ACGT"]
        assert prepare.main([*sources, *arguments, f"--workers={workers}"]) == 2
        assert f"error: {tmp_path / name}{place}: {reason}" in capfd.readouterr().err
        assert not (tmp_path / "data").exists()
