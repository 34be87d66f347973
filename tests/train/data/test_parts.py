"""Runs of `stu-prepare --part I/N` together write the same shards as one run."""

import contextlib
import dataclasses
import errno
import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from stu.common.errors import UserError
from stu.tokenizers.sentence_piece import train_bpe
from tests import forked
from tests.train.token_shards import read_tokens
from train.data.cli import main
from train.data.config import PrepareConfig
from train.data.lock_file import LockFile
from train.data.parts import Parts, files_of_part
from train.data.prepare import prepare, prepare_part
from train.data.rows.packing import all_bounds
from train.data.shards import Index, TokenShards

COUNT = 3
QUICK = {"vocab_size": 320, "validation_fraction": 0.2, "workers": 1, "shard_tokens": 500}


def _texts(name, num_documents):
    return [
        f"def function_{name}_{i}(x):\n\treturn x + {i * i}  # número\n"
        for i in range(num_documents)
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Seven files of different sizes, an empty document in each."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in range(7):
        lines = [json.dumps({"text": text}) for text in [*_texts(name, 5 + 9 * name), " "]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "picture.png").touch()
    return folder


@pytest.fixture
def copied_corpus(corpus, tmp_path):
    """A corpus to change."""
    return shutil.copytree(corpus, tmp_path / "corpus")


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """Token shards of the corpus made by one run."""
    output = tmp_path_factory.mktemp("whole") / "data"
    prepare(_config(corpus, output, None))
    return output


def _config(corpus, output, part, **changes):
    name = None if part is None else f"{part}/{changes.pop('count', COUNT)}"
    return PrepareConfig([str(corpus)], output, part=name, **(QUICK | changes))


def _assert_equal(output, whole):
    """Compare two folders, except for the ends of their token files."""
    assert read_tokens(output) == read_tokens(whole)
    model = "tokenizer.model"
    assert (output / model).read_bytes() == (whole / model).read_bytes()
    index, expected = (Index.load(folder) for folder in (output, whole))
    for name, split in index.splits.items():
        expected.splits[name] = dataclasses.replace(expected.splits[name], shards=split.shards)
    assert index == expected
    for name in index.splits:
        starts, expected_starts = (
            all_bounds(TokenShards(f, name).documents) for f in (output, whole)
        )
        assert starts.tolist() == expected_starts.tolist()
    named = {Path(shard.file).stem for split in index.splits.values() for shard in split.shards}
    files = {f"{name}{suffix}" for name in named for suffix in (".bin", ".starts")}
    assert {path.name for path in output.iterdir()} == files | {model, "index.json", "parts.json"}
    assert {path.name for path in output.parent.iterdir()} == {output.name, f"{output.name}.lock"}


@pytest.mark.parametrize("order", [(0,), (2, 0, 1), tuple(range(12))])
def test_joined_parts_equal_one_run(corpus, whole, tmp_path, order):
    """Also with more parts than files. Token files are moved, not copied."""
    output, count, moved = tmp_path / "new" / "data", len(order), set()
    for done, part in enumerate(order, start=1):
        assert not output.exists()
        missing = prepare_part(_config(corpus, output, part, count=count))
        assert missing == sorted(order[done:])
        moved |= {path.stat().st_ino for path in output.parent.glob("data.parts/*/*.bin")}
    _assert_equal(output, whole)
    assert moved <= {path.stat().st_ino for path in output.iterdir()}
    assert len(Index.load(output).splits["train"].shards) > COUNT


def test_a_part_that_exists_is_not_made_again(corpus, whole, tmp_path):
    output = tmp_path / "data"
    prepare_part(_config(corpus, output, 1))
    index = tmp_path / "data.parts" / "1-of-3" / "index.json"
    before = index.stat()
    assert prepare_part(_config(corpus, output, 1, workers=2)) == [0, 2]
    assert index.stat() == before
    for part in (0, 2):
        prepare_part(_config(corpus, output, part))
    for part in range(COUNT):  # as a task that is killed after it has joined the parts
        assert prepare_part(_config(corpus, output, part)) == []
    _assert_equal(output, whole)


def test_other_settings_are_refused(corpus, tmp_path):
    tokenizer = train_bpe(_texts(0, 100), 300, tmp_path / "other.model").path
    output = tmp_path / "data"
    for done in range(COUNT):  # with some parts, and with all of them joined
        prepare_part(_config(corpus, output, done))
        before = sorted(tmp_path.rglob("*"))
        for changes, message in [
            ({"seed": 1}, "^seed 1: .* was made with 0; use that, choose another output, or"),
            ({"text_key": "body"}, "^text_key body: .* was made with text;"),
            ({"on_error": "skip"}, "^on_error skip: .* was made with stop;"),
            ({"vocab_size": 321}, "^vocab_size 321: .* was made with 320;"),
            ({"validation_fraction": 0.1}, "^validation_fraction 0.1: .* was made with 0.2;"),
            ({"shard_tokens": 501}, "^shard_tokens 501: .* was made with 500;"),
            ({"count": 4}, "^number of parts 4: .* was made with 3;"),
            ({"tokenizer": tokenizer}, "^tokenizer [0-9a-f]{64}: .* was made with trained;"),
        ]:
            for part in (0, 2):
                with pytest.raises(UserError, match=message):
                    prepare_part(_config(corpus, output, part, **changes))
        assert sorted(tmp_path.rglob("*")) == before


def test_sources_that_have_changed_are_refused(copied_corpus, tmp_path):
    prepare_part(_config(copied_corpus, tmp_path / "data", 0))
    with (copied_corpus / "3.jsonl").open("a") as file:
        file.write(json.dumps({"text": "more"}) + "\n")
    with pytest.raises(UserError, match=r"^sources 7 files of .* was made with 7 files of"):
        prepare_part(_config(copied_corpus, tmp_path / "data", 1))


@pytest.mark.parametrize("part", ["3/3", "-1/3", "1", "1/0", "a/b", ""])
def test_invalid_parts_are_refused(corpus, tmp_path, part, capsys):
    assert main([str(corpus), "--output", str(tmp_path / "data"), f"--part={part}"]) == 2
    assert "it must be i/n with 0 <= i < n" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_output_that_was_not_made_in_parts_is_not_changed(corpus, whole):
    before = sorted(whole.parent.rglob("*"))
    with pytest.raises(UserError, match="it must be new or empty; choose another, or delete it"):
        prepare_part(_config(corpus, whole, 0))
    (whole.parent / "data.lock").unlink()
    assert sorted(whole.parent.rglob("*")) == before


def test_joined_parts_skip_the_rows_that_one_run_skips(copied_corpus, tmp_path):
    output, alone = tmp_path / "out" / "data", tmp_path / "alone" / "data"
    (copied_corpus / "book.txt").write_text("".join(_texts(9, 500)))  # in pieces
    with (copied_corpus / "0.jsonl").open("a") as file:
        file.write("{\n" * 20)  # most of this part, but not of the corpus
    with (copied_corpus / "6.jsonl").open("a") as file:
        file.write("{}\n")
    prepare(_config(copied_corpus, alone, None, on_error="skip"))
    for part in range(COUNT):
        prepare_part(_config(copied_corpus, output, part, on_error="skip"))
    assert read_tokens(output) == read_tokens(alone)
    assert Index.load(output).num_bad_rows == {"not JSON": 20, "no field": 1}
    skipped = [(folder / "skipped.jsonl").read_text() for folder in (output, alone)]
    assert skipped[0] == skipped[1]


def test_a_part_that_fails_leaves_the_others(copied_corpus, whole, tmp_path):
    """The tokenizer exists, as training one would read all files."""
    good = (copied_corpus / "6.jsonl").read_bytes()
    (copied_corpus / "6.jsonl").write_bytes(good[:-10] + b"\xe9" * 9 + b"\n")
    output, changes = tmp_path / "out" / "data", {"tokenizer": whole, "vocab_size": 4096}
    prepare_part(_config(copied_corpus, output, 0, **changes))
    with pytest.raises(UserError, match=r"6\.jsonl line 60: not UTF-8"):
        prepare_part(_config(copied_corpus, output, 2, **changes))
    assert prepare_part(_config(copied_corpus, output, 1, **changes)) == [2]
    (copied_corpus / "6.jsonl").write_bytes(good)
    assert prepare_part(_config(copied_corpus, output, 2, **changes)) == []
    assert read_tokens(output) == read_tokens(whole)


def test_a_split_without_documents_is_refused_when_all_parts_exist(corpus, whole, tmp_path):
    changes = {"tokenizer": whole, "validation_fraction": 1e-9}
    for part in (0, 1):
        prepare_part(_config(corpus, tmp_path / "data", part, **changes))
    with pytest.raises(UserError, match="the validation split got none of 224 documents"):
        prepare_part(_config(corpus, tmp_path / "data", 2, **changes))
    assert not (tmp_path / "data").exists()


class Interruption(BaseException):
    """Stands for a kill: no code catches it."""


def test_joining_continues_after_any_interruption(corpus, whole, tmp_path, monkeypatch):
    ready = tmp_path / "ready"
    for part in range(COUNT):
        with monkeypatch.context() as patch:
            patch.setattr(Parts, "missing", lambda _: list(range(COUNT)))
            prepare_part(_config(corpus, ready / "data", part))
    for left in ["data.parts/.index.json.01.tmp", "data.parts/.0-of-3.01.tmp/train-00000.bin"]:
        (ready / left).parent.mkdir(exist_ok=True)  # left by a kill
        (ready / left).touch()
    for step in range(100):
        output = tmp_path / str(step) / "data"
        shutil.copytree(ready, output.parent)
        with monkeypatch.context() as patch:
            steps = iter(range(step))
            for owner, name in [(Path, "replace"), (shutil, "rmtree")]:
                patch.setattr(owner, name, _interrupted(getattr(owner, name), steps))
            try:
                prepare_part(_config(corpus, output, 1))
            except Interruption:
                assert not output.exists()
            else:
                break
        assert prepare_part(_config(corpus, output, 0)) == []
        _assert_equal(output, whole)
    num_files = sum(len(split.shards) for split in Index.load(whole).splits.values())
    assert 100 > step >= num_files + 1 + COUNT + 1  # index, folders of the parts, the whole


def _interrupted(action, steps):
    def act(*arguments, **named):
        if next(steps, None) is None:
            raise Interruption
        return action(*arguments, **named)

    return act


def test_a_token_file_that_is_missing_is_named(corpus, tmp_path):
    for part in (0, 1):
        prepare_part(_config(corpus, tmp_path / "data", part))
    (tmp_path / "data.parts" / "0-of-3" / "train-00000.bin").unlink()
    with pytest.raises(UserError, match=r"0-of-3/train-00000\.bin: no such file; delete its"):
        prepare_part(_config(corpus, tmp_path / "data", 2))
    shutil.rmtree(tmp_path / "data.parts" / "0-of-3")
    assert prepare_part(_config(corpus, tmp_path / "data", 0)) == []


def _start(corpus, output, part, setup="pass"):
    """Start the command as a process, after the code `setup`."""
    options = {**QUICK, "output": output, "part": f"{part}/{COUNT}"}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    code = f"import sys; from train.data import cli; {setup}; sys.exit(cli.main())"
    return forked.Popen(
        [forked.python(), "-c", code, corpus, *arguments], stderr=subprocess.PIPE, text=True
    )


def test_parts_may_be_started_twice_at_once(corpus, whole, tmp_path):
    """An array may be submitted again while it runs."""
    processes = [_start(corpus, tmp_path / "data", part % COUNT) for part in range(2 * COUNT)]
    errors = "".join(process.communicate(timeout=100)[1] for process in processes)
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    assert errors.count("training the tokenizer") == 1
    assert "Traceback" not in errors
    _assert_equal(tmp_path / "data", whole)


@pytest.mark.parametrize(
    ("function", "leftover"),
    [
        ("tokenizer.train_bpe", ".data.parts.*.tmp"),
        ("shards.SplitWriter.finish", "data.parts/.1-of-3.*.tmp"),
    ],
)
def test_a_killed_run_is_repeated(corpus, whole, tmp_path, function, leftover):
    """Unfinished files of the tokenizer or the part are removed."""
    output = tmp_path / "out" / "data"
    kill = "import os; from train.data import shards, tokenizer; "
    kill += f"{function} = lambda *_: os.kill(os.getpid(), 9)"
    process = _start(corpus, output, 1, kill)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert len(list(output.parent.glob(leftover))) == 1
    assert not Parts(output, COUNT).path(1).exists()
    for done, part in enumerate((1, 0, 2), start=1):
        assert len(prepare_part(_config(corpus, output, part))) == COUNT - done
        assert not list(output.parent.glob(leftover))
    _assert_equal(output, whole)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 50])
def test_parts_divide_the_files_in_order(tmp_path, count):
    files = []
    for name, size in enumerate([0, 300, 100, 0, 10, 90, 250, 120, 130, 0]):
        files.append(tmp_path / str(name))
        files[-1].write_bytes(b"x" * size)
    parts = [files_of_part(files, number, count) for number in range(count)]
    assert [path for part in parts for path in part] == files
    sizes = [sum(path.stat().st_size for path in part) for part in parts]
    assert max(sizes) <= 1000 / count + 300  # up to half of a file at either end
    assert files_of_part(files[:1], 0, count) == files[:1]  # an empty file


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with (
        contextlib.closing(LockFile(tmp_path / "a.lock")) as lock,
        pytest.raises(
            OSError, match=r"a\.lock: cannot be locked .Function not .* choose an output"
        ),
        lock.held(0),
    ):
        pass


def test_the_command_prints_how_many_parts_are_missing(corpus, tmp_path, capsys):
    arguments = [str(corpus), "--output", str(tmp_path / "data"), "--vocab-size=320"]
    arguments += ["--validation-fraction=0.2", "--workers=1"]
    for part, message in [
        ("0/2", "part 0/2 is done; parts still missing: 1"),
        ("1/2", "left out: 7 empty documents, 1 files of another kind"),
    ]:
        assert main([*arguments, "--part", part]) == 0
        assert message in capsys.readouterr().out
