"""`stu-prepare` writes the same shards for the same text every time, or nothing at all."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stu.common.errors import UserError
from stu.tokenizer import read_tokenizer
from stu.tokenizers.sentence_piece import train_bpe
from train.data import encode
from train.data.cli import main, warnings
from train.data.config import PrepareConfig
from train.data.encode import encode_document, split_of, token_dtype
from train.data.prepare import prepare, prepare_part, remove_unfinished
from train.data.reading.documents import read_documents
from train.data.reading.sources import LEAST_PIECE_BYTES
from train.data.shards import Index, TokenShards

NUM_DOCUMENTS = 200
TEXTS = [
    f"def function_{i}(argument):\n\treturn argument + {i * i}  # número {i}\n"
    for i in range(NUM_DOCUMENTS)
]


def _row(text):
    return json.dumps({"text": text}).encode() + b"\n"


GOOD = b"".join(_row(text) for text in TEXTS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return _write(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", [*TEXTS, "", " \n"])


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    """Token shards of the corpus, in a folder that was empty."""
    output = tmp_path_factory.mktemp("prepared")
    prepare(_config(corpus, output))
    return output


def _write(path, texts):
    path.write_bytes(b"".join(_row(text) for text in texts))
    return path


def _config(source, output, **changes):
    quick = {"vocab_size": 320, "validation_fraction": 0.2, "workers": 1}
    return PrepareConfig(sources=[str(source)], output=output, **(quick | changes))


def _documents(folder, split):
    """Cut a split at BOS and EOS, and decode the documents."""
    shards, tokenizer = TokenShards(folder, split), read_tokenizer(folder / "tokenizer.model")
    tokens = shards.read(0, len(shards))
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    assert starts.tolist() == [0, *(ends[:-1] + 1)]
    assert ends[-1] == len(tokens) - 1
    return [
        tokenizer.decode(tokens[start + 1 : end].tolist())
        for start, end in zip(starts, ends, strict=True)
    ]


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_document_is_in_one_split_in_order(tmp_path):
    """Equal documents are in the same split."""
    corpus = _write(tmp_path / "corpus.jsonl", [*TEXTS, "", *TEXTS, " \n"])
    index = prepare(_config(corpus, tmp_path / "data", shard_tokens=500))
    documents = {split: _documents(tmp_path / "data", split) for split in index.splits}
    in_train = {*documents["train"]}
    assert documents["train"] == [text for text in TEXTS * 2 if text in in_train]
    assert documents["validation"] == [text for text in TEXTS * 2 if text not in in_train]
    assert 40 <= len(documents["validation"]) <= 120  # 0.2 of 400, four standard deviations
    assert index == Index.load(tmp_path / "data")
    assert index.num_empty_documents == 2
    assert (index.dtype, index.vocab_size, index.seed) == ("uint16", 320, 0)
    for name, split in index.splits.items():
        assert split.num_documents == len(documents[name])
        assert split.num_bytes == sum(len(text.encode()) for text in documents[name])
        assert len(split.shards) > 1
        assert max(shard.num_tokens for shard in split.shards) <= 500


def test_the_result_does_not_depend_on_the_number_of_workers(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BATCH_CHARS", 500)  # many batches for each worker
    prepare(_config(corpus, tmp_path / "one", workers=1))
    prepare(_config(corpus, tmp_path / "two", workers=2))
    assert _files(tmp_path / "one") == _files(tmp_path / "two")


def test_one_large_text_file_is_divided_between_the_splits(tmp_path):
    """Consecutive pieces in a split are joined without marks, and EOS occurs once."""
    book = tmp_path / "book.txt"
    book.write_text("\n".join(text + ("\n" if i % 3 else "") for i, text in enumerate(TEXTS * 6)))
    runs = {"train": [], "validation": []}
    before = None
    for piece in read_documents([book], piece_bytes=LEAST_PIECE_BYTES):
        split = split_of(piece.text, 0, 0.2)
        if split == before:
            runs[split][-1] += piece.text
        else:
            runs[split].append(piece.text)
        before = split
    assert len(runs["train"]) > 1
    index = prepare(_config(book, tmp_path / "data"))
    prepare(_config(book, tmp_path / "again", workers=2))
    assert _files(tmp_path / "data") == _files(tmp_path / "again")
    num_ends = 0
    for split, texts in runs.items():
        shards = TokenShards(tmp_path / "data", split)
        tokenizer, tokens = read_tokenizer(shards.tokenizer_path), shards.read(0, len(shards))
        starts = np.flatnonzero(tokens == tokenizer.bos_id)
        found = np.split(tokens, starts)
        assert not len(found[0])
        assert [tokenizer.decode(run.tolist()) for run in found[1:]] == texts
        assert index.splits[split].num_documents == len(texts)
        assert index.splits[split].num_bytes == sum(len(text.encode()) for text in texts)
        num_ends += int((tokens == tokenizer.eos_id).sum())
    assert num_ends == 1


BAD = b'{\n{"words": 1}\n{"text": "\xff"}\n'


def test_bad_rows_are_skipped_and_listed(tmp_path, capsys):
    (tmp_path / "corpus.jsonl").write_bytes(BAD + GOOD + BAD)
    output = tmp_path / "data"
    arguments = [str(tmp_path / "corpus.jsonl"), "--output", str(output), "--vocab-size=320"]
    arguments += ["--validation-fraction=0.2", "--workers=1"]
    assert main(arguments) == 2
    assert "corpus.jsonl line 1: not JSON" in capsys.readouterr().err
    assert main([*arguments, "--on-error=skip"]) == 0
    printed = capsys.readouterr().out
    assert f"could not be read: 6 (2 not JSON, 2 no field, 2 not UTF-8), see {output}" in printed
    assert "in all: 206 documents" in printed
    index = Index.load(output)
    assert index.num_bad_rows == {"not JSON": 2, "no field": 2, "not UTF-8": 2}
    assert index.num_read == 200
    rows = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert [row["place"] for row in rows] == [f"line {i}" for i in (1, 2, 3, 204, 205, 206)]
    assert rows[1]["kind"] == "no field"
    assert rows[1]["file"].endswith("corpus.jsonl")


def test_the_list_of_bad_rows_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.reading.skipped.MOST_LISTED", 4)
    (tmp_path / "corpus.jsonl").write_bytes(GOOD + BAD * 3)
    prepare(_config(tmp_path / "corpus.jsonl", tmp_path / "data", on_error="skip"))
    assert len((tmp_path / "data" / "skipped.jsonl").read_text().splitlines()) == 4


def test_a_corpus_that_is_mostly_bad_is_refused(tmp_path):
    (tmp_path / "corpus.jsonl").write_bytes(GOOD + BAD * 67)
    with pytest.raises(UserError, match=r"201 of 401 rows cannot be read .*line 201: not JSON"):
        prepare(_config(tmp_path / "corpus.jsonl", tmp_path / "data", on_error="skip"))
    (tmp_path / "corpus.jsonl").write_bytes(GOOD)
    wrong = _config(tmp_path / "corpus.jsonl", tmp_path / "data", text_key="body", on_error="skip")
    with pytest.raises(UserError, match=r"200 of 200 rows cannot be read .* no field 'body'"):
        prepare(wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_small_splits_cause_warnings(prepared, monkeypatch):
    index = Index.load(prepared)
    train, validation = (index.splits[name].num_tokens for name in ("train", "validation"))
    about_validation, about_train = warnings(index)
    assert f"the validation split has only {validation:,} tokens" in about_validation
    assert about_validation.endswith("give more text")
    assert f"the train split has only {train:,} tokens" in about_train
    monkeypatch.setattr("train.data.cli.FEW_TOKENS", validation)
    assert not warnings(index)
    monkeypatch.setattr("train.data.cli.FEW_TOKENS", validation + 1)
    monkeypatch.setattr("train.data.cli.LARGEST_FRACTION", 0.9)
    (only,) = warnings(index)
    assert re.search(r"raise --validation-fraction to 0\.\d+$", only)


def test_the_seed_decides_the_split(corpus, prepared, tmp_path):
    prepare(_config(corpus, tmp_path / "data", seed=1))
    assert {*_documents(tmp_path / "data", "train")} != {*_documents(prepared, "train")}


def test_the_split_of_a_text_never_changes():
    """Otherwise validation text would be trained on when a corpus is prepared again."""
    held_out = [i for i in range(8) if split_of(f"text {i}", 0, 0.3) == "validation"]
    assert held_out == [4]


def test_the_tokenizer_learns_from_training_documents_only(tmp_path):
    held_out = [text for text in TEXTS if split_of(text, 0, 0.2) == "validation"]
    marked = [t + "zyzzyva " * 40 if t in held_out else t for t in TEXTS]
    # The mark changes the hash: keep those that are still held out.
    marked = [t for t in marked if ("zyzzyva" in t) == (split_of(t, 0, 0.2) == "validation")]
    assert sum("zyzzyva" in text for text in marked) > 3
    prepare(_config(_write(tmp_path / "marked.jsonl", marked), tmp_path / "data"))
    assert len(read_tokenizer(tmp_path / "data" / "tokenizer.model").encode("zyzzyva")) >= 6


def test_the_sample_for_the_tokenizer_is_bounded_and_does_not_depend_on_the_order(
    tmp_path, monkeypatch
):
    seen = []

    def spy(texts, vocab_size, path):
        seen.append(sorted(texts))
        return train_bpe(TEXTS, vocab_size, path)

    monkeypatch.setattr("train.data.tokenizer.TOKENIZER_SAMPLE_BYTES", 2000)
    monkeypatch.setattr("train.data.tokenizer.train_bpe", spy)
    for name, texts in [("a", TEXTS), ("b", TEXTS[::-1])]:
        prepare(_config(_write(tmp_path / f"{name}.jsonl", texts), tmp_path / name))
    assert seen[0] == seen[1]
    assert 1900 < sum(len(text.encode()) for text in seen[0]) <= 2000


def test_another_tokenizer_can_be_used(corpus, tmp_path):
    other = train_bpe(TEXTS, 300, tmp_path / "other.model")
    index = prepare(_config(corpus, tmp_path / "a", tokenizer=other.path))
    assert (index.vocab_size, index.tokenizer_sha256) == (300, other.sha256)
    again = prepare(_config(corpus, tmp_path / "b", tokenizer=tmp_path / "a"))  # a folder
    assert again == index


def test_long_documents_are_encoded_in_pieces(tmp_path, monkeypatch):
    tokenizer = train_bpe(TEXTS, 320, tmp_path / "tokenizer.model")
    text = "".join(TEXTS[:20])
    whole = encode_document(tokenizer, text)
    assert whole.tolist() == [1, *tokenizer.encode(text), 2]
    monkeypatch.setattr(encode, "PIECE_CHARS", 100)
    assert encode_document(tokenizer, text).tolist() == whole.tolist()
    monkeypatch.setattr(encode, "PIECE_CHARS", 7)  # shorter than the lines: other tokens, same text
    assert tokenizer.decode(encode_document(tokenizer, text).tolist()) == text


def test_tokens_take_two_bytes_if_the_vocabulary_allows():
    names = [token_dtype(size).name for size in (4096, 2**16, 2**16 + 1)]
    assert names == ["uint16", "uint16", "uint32"]


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (GOOD + b'{"text": "\xe9"}\n', {}, r"not UTF-8 at byte \d+"),
        (b"", {}, "no text in .*: every document is empty"),
        (_row("") + _row("  \n"), {}, "no text in .*: every document is empty"),
        (_row(TEXTS[0]), {}, "split got none of 1 documents .* one document cannot be in both"),
        (GOOD, {"validation_fraction": 1e-9}, "the validation split got none of 200 .* raise it"),
        (GOOD, {"validation_fraction": 1 - 1e-9}, "the train split got none of 200 .* lower it"),
        (GOOD, {"vocab_size": 60_000}, r"vocab_size 60000 is too large .* works is \d+"),
        (GOOD, {"tokenizer": Path("none.model")}, r"none\.model: no such file"),
        (GOOD, {"text_key": "body"}, "no field 'body', only text"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, content, changes, message):
    """Errors in either pass over the text, with one worker and with two."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "corpus.jsonl").write_bytes(content)
    tokenizer = train_bpe(TEXTS, 300, tmp_path / "in" / "other.model").path
    before = sorted(tmp_path.rglob("*"))
    for more in [{"workers": 1}, {"workers": 2, "tokenizer": tokenizer}]:
        if "vocab_size" in changes and "tokenizer" in more:
            continue
        output = tmp_path / "new" / "deep" / "data"
        config = _config(tmp_path / "in" / "corpus.jsonl", output, **(more | changes))
        with pytest.raises(UserError, match=message):
            prepare(config)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(corpus, tmp_path, monkeypatch):
    def disk_full(*_):
        raise OSError(28, "No space left on device")

    for place in [
        "train.data.shards.SplitWriter.add",
        "train.data.shards.Index.save",
        "stu.common.files.fsync",
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(place, disk_full)
            with pytest.raises(OSError, match="No space left"):
                prepare(_config(corpus, tmp_path / "new" / "data"))
        assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "darwin", reason="its names are UTF-8")
def test_a_source_whose_name_is_not_utf8_is_recorded(tmp_path):
    source = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    _write(Path(source), TEXTS)
    settings = {"vocab_size": 300, "workers": 1}
    prepare(PrepareConfig([source], tmp_path / "whole", **settings))
    assert Index.load(tmp_path / "whole").sources == [source]
    for part in ("0/2", "1/2", "1/2"):
        left = prepare_part(PrepareConfig([source], tmp_path / "parts", part=part, **settings))
    assert left == []
    assert Index.load(tmp_path / "parts").sources == [source]


def test_an_output_that_is_a_mounted_disk_is_refused(corpus, tmp_path, monkeypatch):
    """A folder beside it would be on another disk, and could not take its place."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    for run, part in ((prepare, None), (prepare_part, "0/2")):
        with pytest.raises(UserError, match="a disk is mounted there: name a new folder inside"):
            run(PrepareConfig([str(corpus)], tmp_path / "disk", part=part))
    assert sorted(os.listdir(tmp_path / "disk")) == []


def test_only_leftovers_of_the_same_output_are_removed(tmp_path):
    for name in (".v1.0a1b2c3d.tmp", ".v1.1.0a1b2c3d.tmp", ".v1.small.0a1b2c3d.tmp"):
        (tmp_path / name).mkdir()
    remove_unfinished(tmp_path / "v1")
    assert sorted(os.listdir(tmp_path)) == [".v1.1.0a1b2c3d.tmp", ".v1.small.0a1b2c3d.tmp"]


def test_an_output_that_is_not_empty_is_refused(corpus, prepared):
    before = _files(prepared)
    with pytest.raises(UserError, match="exists and is not empty; choose another, or delete it"):
        prepare(_config(corpus, prepared, seed=1))
    assert _files(prepared) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_fraction": 0.0}, "^validation_fraction=0.0 .* must be between"),
        ({"validation_fraction": float("nan")}, "^validation_fraction=NaN .* must be between"),
        ({"vocab_size": 0}, "^vocab_size=0 .* must be at least 1"),
        ({"shard_tokens": 0}, "^shard_tokens=0 .* must be at least 1"),
        ({"workers": -1}, "^workers=-1 .* must be at least 1, or 0"),
        ({"seed": -1}, "^seed=-1 .* must be between"),
    ],
)
def test_settings_are_checked(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        _config("stdlib:", tmp_path / "data", **changes)


def test_command_line_and_config_file(corpus, tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text("vocab_size: 310\nvalidation_fraction: 0.2\nworkers: 1\n")
    output = tmp_path / "data"
    main([str(corpus), "--config", str(settings), "--output", str(output), "--vocab-size", "330"])
    assert Index.load(output).vocab_size == 330
    printed = capsys.readouterr().out
    assert f"train: {Index.load(output).splits['train'].num_documents} documents" in printed
    assert "left out: 2 empty documents" in printed
    assert main([str(corpus), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("stu-prepare: error: output ")
    assert "Traceback" not in error


def test_progress_without_a_terminal(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.data.progress.LOG_SECONDS", 0)
    prepare(_config(corpus, tmp_path / "data"))
    error = capsys.readouterr().err
    for task in ("choosing text", "tokenizing"):
        assert re.search(rf"{task}: [\d.]+ of [\d.]+ MB, [\d.]+ MB/s, 0:\d\d:\d\d left", error)


def test_sigterm_leaves_nothing(tmp_path):
    source = tmp_path / "corpus.jsonl"
    source.write_bytes(_row("words and more words " * 5000) * 400)
    tokenizer = train_bpe(TEXTS, 300, tmp_path / "other.model").path
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-m", "train.data.cli", str(source), "--workers", "2"]
    command += ["--output", str(tmp_path / "data"), "--tokenizer", str(tokenizer)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        while not list(tmp_path.glob(".data.*/*.bin")):
            assert process.poll() is None, "it ended before it could be stopped"
            time.sleep(0.01)
        process.terminate()
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert sorted(tmp_path.iterdir()) == before
