"""`stu-generate --score`: rows scored instead of decoded."""

import json
import math
import signal
from itertools import count

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from serve.engine.engine import Engine
from tests.serve.conftest import generate, rows_in_order

ROWS = [{"prompt": "def größe(x):\n\treturn"[: 1 + number % 21]} for number in range(90)]
for number in range(0, 90, 3):
    ROWS[number] = {"prompt": "def ", "completion": ROWS[number]["prompt"], "id": f"row {number}"}
ROWS[31] = {"promt": "x"}
EXACT = ["--score", "--batch-invariant", "--max-running", "4"]
"""Otherwise rounding depends on the batch composition."""


def sorted_lines(path):
    return sorted(path.read_bytes().split(b"\n"))


def test_scores_equal_the_forward_pass(run, code_model, code_tokenizer):
    rows = [
        {"prompt": "größe", "id": "a"},
        {"prompt": ""},
        {"prompt": [1, 100, 101]},
        {"prompt": "def", "completion": " f(x)"},
        {"prompt": [1], "completion": [100, 7]},
        {"prompt": "x", "completion": ""},
    ]
    code, written = run(rows, "--score")
    assert code == 0
    start, encode = code_tokenizer.encode_prompt, code_tokenizer.encode
    parts = [
        ([1], encode("größe")),
        ([1], []),
        ([1], [100, 101]),
        (start("def"), encode(" f(x)")),
        ([1], [100, 7]),
        (start("x"), []),
    ]
    for number, (row, (given, scored)) in enumerate(zip(written, parts, strict=True)):
        with torch.inference_mode():
            logprobs = code_model(torch.tensor([given + scored]))[0].double().log_softmax(-1)
        first = len(given) - 1
        expected = sum(logprobs[first + at, token].item() for at, token in enumerate(scored))
        num_bytes = sum(len(code_tokenizer.token_bytes(token)) for token in scored)
        assert row == {
            "id": "a" if number == 0 else number,
            "row": number,
            "logprob": pytest.approx(expected, abs=1e-4),
            "num_tokens": len(scored),
            "num_bytes": num_bytes,
            "bits_per_byte": pytest.approx(-expected / math.log(2) / num_bytes, rel=1e-5)
            if num_bytes
            else None,
        }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"promt": "x"}, "unknown field \"promt\": did you mean 'prompt'?"),
        ({"completion": "x"}, 'field "prompt" is missing'),
        ({"prompt": "x", "completion": None}, "completion=null is not allowed: it must be a str"),
        ({"prompt": "x", "completion": [1.5]}, "completion=[1.5] is not allowed: it must be a str"),
        (
            {"prompt": "x", "completion": "\ud800"},
            "completion is not allowed: it has half of a surrogate pair",
        ),
        (
            {"prompt": "x", "completion": [280]},
            "completion is not allowed: it has the id 280, and the vocabulary ids 0",
        ),
        ({"prompt": "x" * 64}, "maximum context length is 64 tokens"),
        ({"prompt": "x", "temperature": 0}, '"temperature" is not allowed with --score, which gen'),
    ],
)
def test_bad_rows_are_refused_and_change_no_other(run, row, message):
    good = {"prompt": "def"}
    code, (before, refused, after) = run([good, json.dumps(row), good], "--score")
    assert code == 1
    assert refused["error"].startswith("line 2: ")
    assert message in refused["error"]
    assert before["logprob"] == after["logprob"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens is not allowed with --score, which gener"),
        (["--temperature", "0"], "--temperature is not allowed with --score, which generates"),
        (["--seed", "1"], "--seed is not allowed with --score"),
        (["--stop-at-eos", "true"], "--stop-at-eos is not allowed with --score"),
        (["--expected-new-tokens", "3"], "--expected-new-tokens is not allowed with --score"),
        (["--speculate", "ngram"], "--speculate is not allowed with --score"),
        (["--format", "openai"], "rows of OpenAI's format cannot be scored: give rows of"),
    ],
)
def test_options_of_generation_are_refused(run, tmp_path, capsys, options, message):
    code, _ = run([{"prompt": "x"}], "--score", *options)
    assert code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["1.in.jsonl"]


def test_rows_of_openai_are_refused(run, capsys):
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    assert run([row], "--score")[0] == 2
    assert "1.in.jsonl: rows of OpenAI's format cannot be scored" in capsys.readouterr().err


def test_stopped_run_resumes_to_the_same_file(
    tmp_path, model_directory, source, target, monkeypatch
):
    whole = tmp_path / "whole.jsonl"
    assert generate(model_directory, source, whole, *EXACT) == 1
    step, steps = Engine.step, count(1)

    def step_and_stop(self):
        if next(steps) == 25:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Engine, "step", step_and_stop)
    assert generate(model_directory, source, target, *EXACT) == 128 + signal.SIGINT
    monkeypatch.undo()
    assert 0 < target.stat().st_size < whole.stat().st_size
    assert generate(model_directory, source, target, *EXACT) == 1
    assert sorted_lines(target) == sorted_lines(whole)


@pytest.mark.slow
def test_workers_and_parts_write_the_same_rows(
    tmp_path, model_directory, source, target, monkeypatch, capsys
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert generate(model_directory, source, target, *EXACT) == 1
    assert "90 rows (1 with an error), " in capsys.readouterr().err
    expected = sorted_lines(target)
    workers = tmp_path / "workers.jsonl"
    assert generate(model_directory, source, workers, *EXACT, "--devices", "cpu,cpu") == 1
    assert sorted_lines(workers) == expected
    for part in ("0/2", "1/2"):
        generate(model_directory, source, target, *EXACT, "--part", part)
    parts = [target.with_name(f"out.{index}-of-2.jsonl") for index in (0, 1)]
    assert sorted(sorted_lines(parts[0]) + sorted_lines(parts[1])[1:]) == expected


def test_output_of_scores_is_not_resumed_by_generation(model_directory, source, target, capsys):
    assert generate(model_directory, source, target, "--score") == 1
    before = target.read_bytes()
    capsys.readouterr()
    assert generate(model_directory, source, target) == 2
    assert 'was begun with format="scores", ' in capsys.readouterr().err
    assert target.read_bytes() == before
    assert generate(model_directory, source, target, "--score", "--max-running", "2") == 1


def test_progress_counts_tokens_of_prompts(run, capsys):
    assert run([{"prompt": [1] * 10}] * 3, "--score")[0] == 0
    assert "3 rows, 30 tokens in " in capsys.readouterr().err


def test_parquet_prompts_are_scored(tmp_path, model_directory, run):
    pq.write_table(pa.table({"text": ["def f", "x"]}), tmp_path / "in.parquet")
    target = tmp_path / "out.jsonl"
    options = ["--score", "--column", "text"]
    assert generate(model_directory, tmp_path / "in.parquet", target, *options) == 0
    assert rows_in_order(target) == run([{"prompt": "def f"}, {"prompt": "x"}], "--score")[1]
