"""Runs of `stu-generate` that were stopped or killed resume."""

import json
import random
import signal
from contextlib import suppress
from itertools import count

import pytest
import torch

from serve.batch.sink import OutputFile
from serve.engine.engine import Engine
from stu.model import FlashSTU
from stu.model_dir import save_model
from tests.serve.conftest import generate, read_rows, wait_for_bytes

ROWS = [
    {"prompt": "def f(x)"[: number % 9], "max_new_tokens": 10 + number % 20, "temperature": 1}
    for number in range(40)
]
ROWS[20] = ROWS[30] = {"promt": "x"}


def sorted_lines(path):
    return sorted(path.read_bytes().split(b"\n"))


@pytest.mark.parametrize("num_kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_run_loses_and_doubles_no_row(
    tmp_path, model_directory, source, target, start, num_kills
):
    # Otherwise rounding depends on the batch composition.
    options = ["--batch-invariant", "--max-running", "8"]
    uninterrupted = tmp_path / "uninterrupted.jsonl"
    assert generate(model_directory, source, uninterrupted, *options) == 1
    num_bytes = uninterrupted.stat().st_size
    moments = random.Random(0)
    for _ in range(num_kills):
        process = start(model_directory, source, target, *options)
        at = target.stat().st_size if target.exists() else 0
        wait_for_bytes(process, target, at + moments.randrange(num_bytes // 15))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert 0 < target.stat().st_size < num_bytes
    assert generate(model_directory, source, target, *options) == 1
    assert sorted_lines(target) == sorted_lines(uninterrupted)


def fill_disk(*_):
    raise OSError("output out.jsonl: No space left on device")


def terminate():
    signal.raise_signal(signal.SIGTERM)


def terminate_in_a_library():
    """Raise the signal where a library catches the exception of its handler."""
    with suppress(SystemExit):
        terminate()


@pytest.mark.parametrize(
    ("owner", "method", "number", "stop", "code"),
    [
        (Engine, "step", 15, terminate, 143),
        (Engine, "step", 15, terminate_in_a_library, 143),
        (Engine, "step", 15, lambda: signal.raise_signal(signal.SIGINT), 130),
        (OutputFile, "append", 5, fill_disk, 2),
    ],
)
def test_stopped_run_keeps_its_rows_and_resumes(
    model_directory, source, target, monkeypatch, capsys, owner, method, number, stop, code
):
    call, calls = getattr(owner, method), count(1)

    def call_or_stop(*arguments):
        if next(calls) == number:
            stop()
        return call(*arguments)

    monkeypatch.setattr(owner, method, call_or_stop)
    try:
        ended = generate(model_directory, source, target)
    except SystemExit as stopped:
        ended = stopped.code
    assert ended == code
    monkeypatch.undo()
    before = read_rows(target)
    assert 0 < len(before) < len(ROWS)
    expected = f"stopped; {target} has {len(before)} rows, and the same command resumes from there"
    printed = capsys.readouterr().err
    assert expected in printed
    assert "error: output out.jsonl: No space left on device" in printed or code != 2
    assert generate(model_directory, source, target) == 1
    after = read_rows(target)
    assert after[: len(before)] == before
    assert sorted(row["row"] for row in after) == list(range(len(ROWS)))
    assert f", besides {len(before)} from before (2" in capsys.readouterr().err


def test_finished_run_loads_no_model(model_directory, source, target, monkeypatch, capsys):
    assert generate(model_directory, source, target) == 1
    before = target.read_bytes()

    def load_model(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr("serve.parallel.loading.load_model", load_model)
    assert generate(model_directory, source, target) == 1
    assert target.read_bytes() == before
    assert "0 rows, besides 40 from before (2 with an error)" in capsys.readouterr().err


def cut_in_half(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))


def test_settings_that_decide_no_row_may_change(model_directory, source, target):
    assert generate(model_directory, source, target) == 1
    whole = sorted_lines(target)
    cut_in_half(target)
    options = ["--max-running", "3", "--page-len", "8", "--devices", "cpu", "--cache-gib", "0.02"]
    defaults = ["--temperature", "0", "--seed", "0", "--stop-at-eos", "true"]
    assert generate(model_directory, source, target, *options, *defaults) == 1
    assert sorted_lines(target) == whole


def test_settings_that_decide_rows_may_not_change(
    tmp_path, model_directory, source, target, code_model, code_tokenizer, capsys
):
    model = tmp_path / "model"
    save_model(model, code_model, code_tokenizer, {"max_new_tokens": 9})
    assert generate(model, source, target) == 1
    cut_in_half(target)
    before = target.read_bytes()

    def refused(*options):
        assert generate(model, source, target, *options) == 2
        assert target.read_bytes() == before
        return capsys.readouterr().err

    capsys.readouterr()
    assert "was begun with temperature=0.0, and this run has temperature=0.5; run it as" in refused(
        "--temperature", "0.5"
    )
    assert "with seed=0, and this run has seed=7" in refused("--seed", "7")
    assert 'dtype="float32", and this run has dtype="bfloat16"' in refused("--dtype", "bfloat16")
    assert "batch_invariant=false, and" in refused("--batch-invariant")
    assert 'format="prompts", ' in refused("--format", "openai")
    generation = model / "generation.json"
    generation.write_text(json.dumps({"max_new_tokens": 5}))
    assert "with max_new_tokens=9, and this run has max_new_tokens=5" in refused()
    generation.write_text(json.dumps({"max_new_tokens": 9}))

    torch.manual_seed(7)
    other = FlashSTU(code_model.config)
    save_model(model, other, code_tokenizer, {"max_new_tokens": 9}, overwrite=True)
    assert "was begun with model.safetensors=" in refused()
    save_model(model, code_model, code_tokenizer, {"max_new_tokens": 9}, overwrite=True)
    source.write_bytes(source.read_bytes() + b"\n")
    assert "was begun with input=" in refused()
    assert generate(model, source, target, "--overwrite") == 1
    assert len(read_rows(target)) == len(ROWS)
