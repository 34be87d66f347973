"""Runs of `stu-prepare --part I/N` together write what one run writes, however they end."""

import contextlib
import dataclasses
import errno
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stu.common.errors import UserError
from stu.tokenizer import train_bpe
from train.data.cli import main
from train.data.config import PrepareConfig
from train.data.lock_file import LockFile
from train.data.parts import Parts, files_of_part
from train.data.prepare import prepare, prepare_part
from train.data.shards import Index, TokenShards

COUNT = 3
SPLITS = "train", "validation"
QUICK: dict[str, Any] = {
    "vocab_size": 320,
    "validation_fraction": 0.2,
    "workers": 1,
    "shard_tokens": 500,
}


def _texts(name: int, num_documents: int) -> list[str]:
    return [
        f"def function_{name}_{i}(x):\n\treturn x + {i * i}  # número\n"
        for i in range(num_documents)
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven files of different sizes, an empty document in each."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in range(7):
        lines = [json.dumps({"text": text}) for text in [*_texts(name, 5 + 9 * name), " "]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "picture.png").touch()
    return folder


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of the corpus made by one run."""
    output = tmp_path_factory.mktemp("whole") / "data"
    prepare(_config(corpus, output, None))
    return output


def _config(corpus: Path, output: Path, part: int | None, **changes: Any) -> PrepareConfig:
    name = None if part is None else f"{part}/{changes.pop('count', COUNT)}"
    return PrepareConfig([str(corpus)], output, part=name, **(QUICK | changes))


def _tokens(folder: Path) -> dict[str, list[int]]:
    splits = {split: TokenShards(folder, split) for split in SPLITS}
    return {split: shards.read(0, len(shards)).tolist() for split, shards in splits.items()}


def _assert_equal(output: Path, whole: Path) -> None:
    """Compare two folders, except for the ends of their token files."""
    assert _tokens(output) == _tokens(whole)
    model = "tokenizer.model"
    assert (output / model).read_bytes() == (whole / model).read_bytes()
    indexes = []
    for folder in (output, whole):
        index = Index.load(folder)
        splits = {name: dataclasses.replace(s, shards=[]) for name, s in index.splits.items()}
        indexes.append(dataclasses.replace(index, splits=splits))
    assert indexes[0] == indexes[1]
    named = {shard.file for split in Index.load(output).splits.values() for shard in split.shards}
    assert {path.name for path in output.iterdir()} == named | {model, "index.json", "parts.json"}
    assert {path.name for path in output.parent.iterdir()} == {output.name, f"{output.name}.lock"}


@pytest.mark.parametrize("order", [(0,), (0, 1, 2), (2, 0, 1), tuple(range(12))])
def test_parts_together_equal_one_run(
    corpus: Path, whole: Path, tmp_path: Path, order: tuple[int, ...]
) -> None:
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


def test_a_part_that_is_there_is_left_alone(corpus: Path, whole: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "^seed 1: .* was made with 0; use that, choose another output, or delete"),
        ({"text_key": "body"}, "^text_key body: .* was made with text;"),
        ({"on_error": "skip"}, "^on_error skip: .* was made with stop;"),
        ({"vocab_size": 321}, "^vocab_size 321: .* was made with 320;"),
        ({"validation_fraction": 0.1}, "^validation_fraction 0.1: .* was made with 0.2;"),
        ({"shard_tokens": 501}, "^shard_tokens 501: .* was made with 500;"),
        ({"count": 4}, "^number of parts 4: .* was made with 3;"),
        ({"tokenizer": "given"}, "^tokenizer [0-9a-f]{64}: .* was made with trained;"),
    ],
)
def test_other_settings_are_refused(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "tokenizer" in changes:
        given = train_bpe(_texts(0, 100), 300, tmp_path / "given.model").path
        changes = {"tokenizer": given}
    output = tmp_path / "data"
    for done in range(COUNT):  # with some parts, and with all of them joined
        prepare_part(_config(corpus, output, done))
        before = sorted(tmp_path.rglob("*"))
        for part in (0, 2):
            with pytest.raises(UserError, match=message):
                prepare_part(_config(corpus, output, part, **changes))
        assert sorted(tmp_path.rglob("*")) == before


def test_sources_that_have_changed_are_refused(corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    prepare_part(_config(copy, tmp_path / "data", 0))
    with (copy / "3.jsonl").open("a") as file:
        file.write(json.dumps({"text": "more"}) + "\n")
    with pytest.raises(UserError, match=r"^sources 7 files of .* was made with 7 files of"):
        prepare_part(_config(copy, tmp_path / "data", 1))


@pytest.mark.parametrize("part", ["3/3", "-1/3", "1", "1/0", "a/b", ""])
def test_invalid_parts_are_refused(
    corpus: Path, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(corpus), "--output", str(tmp_path / "data"), f"--part={part}"]) == 2
    assert "it must be i/n with 0 <= i < n" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_output_that_was_not_made_in_parts_is_left_alone(corpus: Path, whole: Path) -> None:
    before = sorted(whole.parent.rglob("*"))
    with pytest.raises(UserError, match="it must be new or empty; choose another, or delete it"):
        prepare_part(_config(corpus, whole, 0))
    (whole.parent / "data.lock").unlink()
    assert sorted(whole.parent.rglob("*")) == before


def test_parts_together_skip_what_one_run_skips(corpus: Path, tmp_path: Path) -> None:
    copy, output, alone = (tmp_path / name for name in ("corpus", "out/data", "alone/data"))
    shutil.copytree(corpus, copy)
    (copy / "book.txt").write_text("".join(_texts(9, 500)))  # in pieces
    with (copy / "0.jsonl").open("a") as file:
        file.write("{\n" * 20)  # most of this part, but not of the corpus
    with (copy / "6.jsonl").open("a") as file:
        file.write("{}\n")
    prepare(_config(copy, alone, None, on_error="skip"))
    for part in range(COUNT):
        prepare_part(_config(copy, output, part, on_error="skip"))
    assert _tokens(output) == _tokens(alone)
    assert Index.load(output).num_bad_rows == {"not JSON": 20, "no field": 1}
    skipped = [(folder / "skipped.jsonl").read_text() for folder in (output, alone)]
    assert skipped[0] == skipped[1]


def test_a_part_that_fails_leaves_the_others(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """The tokenizer exists, as training one would read all files."""
    copy = tmp_path / "corpus"
    shutil.copytree(corpus, copy)
    good = (copy / "6.jsonl").read_bytes()
    (copy / "6.jsonl").write_bytes(good[:-10] + b"\xe9" * 9 + b"\n")
    output, given = tmp_path / "out" / "data", {"tokenizer": whole, "vocab_size": 4096}
    prepare_part(_config(copy, output, 0, **given))
    with pytest.raises(UserError, match=r"6\.jsonl line 60: not UTF-8"):
        prepare_part(_config(copy, output, 2, **given))
    assert prepare_part(_config(copy, output, 1, **given)) == [2]
    (copy / "6.jsonl").write_bytes(good)
    assert prepare_part(_config(copy, output, 2, **given)) == []
    assert _tokens(output) == _tokens(whole)


def test_a_split_without_documents_is_refused_when_all_parts_are_there(
    corpus: Path, whole: Path, tmp_path: Path
) -> None:
    changes = {"tokenizer": whole, "validation_fraction": 1e-9}
    for part in (0, 1):
        prepare_part(_config(corpus, tmp_path / "data", part, **changes))
    with pytest.raises(UserError, match="the validation split got none of 224 documents"):
        prepare_part(_config(corpus, tmp_path / "data", 2, **changes))
    assert not (tmp_path / "data").exists()


class Interruption(BaseException):
    """Stands for a kill: no code catches it."""


def test_joining_continues_wherever_it_was_interrupted(
    corpus: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def _interrupted(action: Any, steps: Iterator[int]) -> Any:
    def act(*arguments: Any, **named: Any) -> Any:
        if next(steps, None) is None:
            raise Interruption
        return action(*arguments, **named)

    return act


def test_a_token_file_that_is_missing_is_named(corpus: Path, tmp_path: Path) -> None:
    for part in (0, 1):
        prepare_part(_config(corpus, tmp_path / "data", part))
    (tmp_path / "data.parts" / "0-of-3" / "train-00000.bin").unlink()
    with pytest.raises(UserError, match=r"0-of-3/train-00000\.bin: no such file; delete its"):
        prepare_part(_config(corpus, tmp_path / "data", 2))
    shutil.rmtree(tmp_path / "data.parts" / "0-of-3")
    assert prepare_part(_config(corpus, tmp_path / "data", 0)) == []


def _start(corpus: Path, output: Path, part: int) -> subprocess.Popen[str]:
    """Start the command as a process."""
    command = [sys.executable, "-m", "train.data.cli", corpus, "--output", output]
    options = {**QUICK, "part": f"{part}/{COUNT}"}
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*map(str, command)], text=True, **pipes)


def test_each_part_is_started_twice_at_once(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """An array may be submitted again while it runs."""
    processes = [_start(corpus, tmp_path / "data", part % COUNT) for part in range(2 * COUNT)]
    said = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    errors = "".join(error for _, error in said)
    assert errors.count("training the tokenizer") == 1
    assert "Traceback" not in errors
    _assert_equal(tmp_path / "data", whole)


@pytest.mark.parametrize("at", [".data.parts.*.tmp", "data.parts/.1-of-3.*.tmp"])
def test_a_killed_run_is_repeated(whole: Path, tmp_path: Path, at: str) -> None:
    """Files left while it made the tokenizer or its part are removed."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in range(COUNT):
        lines = [json.dumps({"text": text * 80}) for text in _texts(name, 250)]
        (corpus / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "data"
    process = _start(corpus, output, 1)
    try:
        while not list(output.parent.glob(at)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
    finally:
        process.kill()
        process.communicate()
    assert len(list(output.parent.glob(at))) == 1
    assert not Parts(output, COUNT).path(1).exists()
    for done, part in enumerate((1, 0, 2), start=1):
        assert len(prepare_part(_config(corpus, output, part))) == COUNT - done
        assert not list(output.parent.glob(at))
    prepare(_config(corpus, tmp_path / "alone" / "data", None))
    _assert_equal(output, tmp_path / "alone" / "data")


@pytest.mark.parametrize("count", [1, 2, 3, 8, 50])
def test_parts_are_the_files_in_order(tmp_path: Path, count: int) -> None:
    files = []
    for name, size in enumerate([0, 300, 100, 0, 10, 90, 250, 120, 130, 0]):
        files.append(tmp_path / str(name))
        files[-1].write_bytes(b"x" * size)
    parts = [files_of_part(files, number, count) for number in range(count)]
    assert [path for part in parts for path in part] == files
    sizes = [sum(path.stat().st_size for path in part) for part in parts]
    assert max(sizes) <= 1000 / count + 300  # up to half of a file at either end


def test_parts_of_empty_files(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    empty = tmp_path / "a"
    assert [files_of_part([empty], number, 2) for number in range(2)] == [[empty], []]


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
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


def test_the_command_prints_how_many_parts_are_missing(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(corpus), "--output", str(tmp_path / "data"), "--vocab-size=320"]
    arguments += ["--validation-fraction=0.2", "--workers=1"]
    for part, says in [
        ("0/2", "part 0/2 is done; parts still missing: 1"),
        ("1/2", "left out: 7 empty documents, 1 files of another kind"),
    ]:
        assert main([*arguments, "--part", part]) == 0
        assert says in capsys.readouterr().out
