"""`stu-generate`: its file format, its errors, and what it leaves behind."""

import json
import subprocess
import sys

import pytest
import torch

from serve.batch import main
from serve.lockstep import Runner
from stu.checkpoint import save_model
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.tokenizer import train_bpe

MAX_SEQ_LEN = 64
ROW_KEYS = [
    "id",
    "prompt",
    "completion",
    "num_prompt_tokens",
    "num_completion_tokens",
    "finish_reason",
]
PROMPTS = ["def f(x):\n", "", "return größe + 1", "x", "\tx = 1\n\ty"]
LONG_PROMPT = "".join(chr(ord("0") + i % 7) for i in range(100))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_bpe(["def f(x):\n\treturn x + 1\n" * 20], 280, path)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        num_layers=4,
        num_filters=6,
        num_heads=2,
        window_tokens=7,
        max_seq_len=MAX_SEQ_LEN,
    )
    return FlashSTU(config).eval()


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory, model, tokenizer):
    path = tmp_path_factory.mktemp("export") / "model"
    save_model(path, model, tokenizer, {"max_new_tokens": 9})
    return path


@pytest.fixture
def run(tmp_path, model_directory):
    """Call with rows (or raw lines) and options: the exit code and the rows written."""
    num_calls = 0

    def call(rows, *options):
        nonlocal num_calls
        num_calls += 1
        source, target = tmp_path / f"{num_calls}.in.jsonl", tmp_path / f"{num_calls}.out.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        arguments = [model_directory, "--input", source, "--output", target, *options]
        code = main([str(argument) for argument in arguments])
        written = target.read_text(encoding="utf-8") if target.exists() else ""
        return code, [json.loads(line) for line in written.split("\n")[:-1]]

    return call


def completions(result):
    code, rows = result
    assert code == 0
    return [row["completion"] for row in rows]


def test_greedy_completions_follow_the_forward_pass(run, model, tokenizer):
    code, rows = run([{"prompt": prompt} for prompt in PROMPTS], "--stop-at-eos", "false")
    assert code == 0
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["id"] for row in rows] == list(range(len(PROMPTS)))
    for row in rows:
        assert list(row) == ROW_KEYS
        tokens = [tokenizer.bos_id, *tokenizer.encode(row["prompt"])]
        assert row["num_prompt_tokens"] == len(tokens)
        with torch.inference_mode():
            for _ in range(9):
                tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
        assert row["completion"] == tokenizer.decode(tokens[-9:])
        assert (row["num_completion_tokens"], row["finish_reason"]) == (9, "length")


def test_a_row_s_settings_go_before_the_command_s_and_those_before_the_model_s(run):
    rows = [{"prompt": "x", "max_new_tokens": 3}, {"prompt": "x"}]
    assert [row["num_completion_tokens"] for row in run(rows)[1]] == [3, 9]
    by_command = run(rows, "--max-new-tokens", "5")[1]
    assert [row["num_completion_tokens"] for row in by_command] == [3, 5]
    cold = {"prompt": "x", "temperature": 0}
    greedy = completions(run([cold, cold]))
    assert completions(run([cold, {"prompt": "x"}], "--temperature", "2"))[0] == greedy[0]
    assert completions(run([cold, {"prompt": "x"}], "--temperature", "2"))[1] != greedy[1]
    assert completions(run([{"prompt": "x"}], "--temperature", "2", "--top-k", "1")) == greedy[:1]
    assert completions(run([{"prompt": "x"}], "--temperature", "2", "--top-p", "0.001")) == [
        greedy[0]
    ]


def test_settings_may_come_from_a_file(run, tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text("max_new_tokens: 4\nbatch_size: 2\n")
    _, rows = run([{"prompt": "x"}] * 3, "--config", config)
    assert [row["num_completion_tokens"] for row in rows] == [4, 4, 4]


def test_completions_depend_on_the_seed_and_not_on_the_batch(run):
    rows = [
        {"prompt": prompt, "max_new_tokens": 5 + 3 * number}
        for number, prompt in enumerate(PROMPTS)
    ]
    rows[3] |= {"top_k": 20, "top_p": 0.9}

    def with_options(*options):
        return completions(run(rows, "--temperature", "1.5", *options))

    expected = with_options("--seed", "1")
    for batch_size in ("1", "2", "3"):
        assert with_options("--seed", "1", "--batch-size", batch_size) == expected
    others = with_options("--seed", "2")
    assert all(other != one for other, one in zip(others, expected, strict=True))


def test_equal_prompts_differ_unless_their_seeds_are_equal(run):
    rows = [{"prompt": "x"}, {"prompt": "x"}, *[{"prompt": "x", "seed": 5}] * 2]
    first, second, third, fourth = completions(run(rows, "--temperature", "1"))
    assert len({first, second, third}) == 3
    assert third == fourth


def test_rows_stop_at_eos_one_by_one(run):
    rows = [{"prompt": "x", "max_new_tokens": 60}] * 30
    _, whole = run(rows, "--temperature", "1.5", "--stop-at-eos", "false")
    _, stopped = run(rows, "--temperature", "1.5", "--stop-at-eos", "true")
    reasons = {row["finish_reason"] for row in stopped}
    assert reasons == {"stop", "length"}
    for row, full in zip(stopped, whole, strict=True):
        assert full["finish_reason"] == "length"
        assert full["completion"].startswith(row["completion"])
        shorter = row["num_completion_tokens"] < full["num_completion_tokens"] == 60
        assert shorter == (row["finish_reason"] == "stop")
    # EOS is not counted: with room for the counted tokens only, none comes.
    counts = [max(1, row["num_completion_tokens"]) for row in stopped]
    rows = [{"prompt": "x", "max_new_tokens": count} for count in counts]
    _, cut = run(rows, "--temperature", "1.5")
    assert {row["finish_reason"] for row in cut} == {"length"}
    assert [row["completion"] for row in cut] == [row["completion"] for row in stopped]


def test_any_text_comes_through(run):
    rows = [
        {"id": "ключ", "prompt": "日本\u2028語"},
        "",
        {"id": 10**30, "prompt": 'quote " and \\'},
        "   ",
        {"prompt": "\x00"},
    ]
    code, written = run(rows)
    assert code == 0
    assert [row["id"] for row in written] == ["ключ", 10**30, 4]
    assert [row["prompt"] for row in written] == ["日本\u2028語", 'quote " and \\', "\x00"]


def test_no_rows_give_an_empty_file(run):
    assert run([]) == (0, [])


BAD_ROWS = [
    ('{"prompt": "x"', 2, ["not JSON", "write one object a line"]),
    ("[" * 100_000, 2, ["not JSON that can be read"]),
    ('["x"]', 2, ['["x"] is not a JSON object', '{"prompt": "..."}']),
    ("{}", 2, ['field "prompt" is missing', "give a string"]),
    ('{"prompt": 5}', 2, ["prompt=5", "must be a string"]),
    ('{"prompt": "\\ud800", "id": "k"}', "k", ["prompt has half of a surrogate pair"]),
    ('{"prompt": "x", "id": "\\ud800"}', 2, ["id has half of a surrogate pair"]),
    ('{"prompt": "x", "id": true}', 2, ["id=true", "a string or whole number"]),
    ('{"prompt": "x", "id": [1]}', 2, ["id=[1]", "a string or whole number"]),
    ('{"prompt": "x", "id": "a"}', "a", ["id='a' is taken by line 1", "give another"]),
    ('{"prompt": "x", "id": 1}', 1, ["id=1 is taken by line 2", "its line's number"]),
    ('{"promt": "x"}', 2, ['unknown field "promt"', "did you mean 'prompt'?"]),
    ('{"prompt": "x", "topk": 1}', 2, ['unknown field "topk"', "did you mean 'top_k'?"]),
    ('{"prompt": "x", "temperature": NaN}', 2, ["temperature=nan", "a finite number >= 0"]),
    ('{"prompt": "x", "temperature": "1"}', 2, ["temperature='1'", "a finite number >= 0"]),
    ('{"prompt": "x", "top_k": -3}', 2, ["top_k=-3", "a whole number >= 0"]),
    ('{"prompt": "x", "top_p": 0}', 2, ["top_p=0", "above 0 and at most 1"]),
    ('{"prompt": "x", "seed": 1.5}', 2, ["seed=1.5", "from 0 to"]),
    ('{"prompt": "x", "max_new_tokens": 0}', 2, ["max_new_tokens=0", "whole number >= 1"]),
    ('{"prompt": "x", "max_new_tokens": null}', 2, ["max_new_tokens=null", ">= 1"]),
    (
        '{"prompt": "x", "max_new_tokens": 63}',
        2,
        ["prompt of 2 tokens", "max_new_tokens=63", "max_seq_len=64", "to 62 or shorten"],
    ),
    (
        json.dumps({"prompt": LONG_PROMPT}),
        2,
        ["prompt of 101 tokens", "max_seq_len=64", ": shorten the prompt"],
    ),
]


@pytest.mark.parametrize(("line", "row_id", "parts"), BAD_ROWS)
def test_a_bad_row_is_refused_and_the_others_are_not(run, line, row_id, parts):
    good = {"prompt": "def", "id": "a"}, {"prompt": "x"}, {"prompt": "f(x)", "id": "z"}
    code, rows = run([good[0], good[1], line, good[2]], "--batch-size", "4")
    assert code == 1
    assert rows[2].keys() == {"id", "error"}
    assert rows[2]["id"] == row_id
    assert rows[2]["error"].startswith("line 3: ")
    for part in parts:
        assert part in rows[2]["error"]
    assert [rows[0], rows[1], rows[3]] == run(good)[1]


def test_a_prompt_may_fill_the_context(run):
    code, rows = run([{"prompt": "x", "max_new_tokens": 62}], "--stop-at-eos", "false")
    assert (code, rows[0]["num_completion_tokens"]) == (0, 62)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature=-1.0 is not allowed"),
        (["--top-p", "7"], "top_p=7.0 is not allowed"),
        (["--max-new-tokens", "0"], "max_new_tokens=0 is not allowed"),
        (["--batch-size", "0"], "batch_size=0 is not allowed: it must be >= 1"),
    ],
)
def test_settings_that_are_not_allowed(run, tmp_path, capsys, options, message):
    assert run([{"prompt": "x"}], *options) == (2, [])
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["1.in.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top", "3"], "did you mean 'top-"),
        (["--topk", "3"], "did you mean 'top-k'?"),
        (["--max_new_tokens", "3"], "did you mean 'max-new-tokens'?"),
        (["--temperature", "warm"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--device", "gpu"], "'cpu'"),
    ],
)
def test_options_that_the_parser_refuses(run, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as exit_info:
        run([{"prompt": "x"}], *options)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["1.in.jsonl"]


def test_an_unknown_key_in_a_settings_file(run, tmp_path, capsys):
    config = tmp_path / "settings.yaml"
    config.write_text("topk: 4\n")
    with pytest.raises(SystemExit):
        run([{"prompt": "x"}], "--config", config)
    assert "did you mean 'top-k'?" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there(run, capsys):
    assert run([{"prompt": "x"}], "--device", "cuda") == (2, [])
    assert "device=cuda, and torch sees no CUDA device" in capsys.readouterr().err


def test_files_that_cannot_be_used(tmp_path, model_directory, capsys):
    source, latin = tmp_path / "in.jsonl", tmp_path / "latin.jsonl"
    source.write_text('{"prompt": "x"}\n')
    latin.write_bytes('{"prompt": "x"}\n{"prompt": "größe"}\n'.encode("latin-1"))
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())

    def refused(model, source, target, *options):
        arguments = [model, "--input", source, "--output", target, *options]
        assert main([str(argument) for argument in arguments]) == 2
        assert sorted(tmp_path.iterdir()) == before
        return capsys.readouterr().err

    target = tmp_path / "out.jsonl"
    assert "no such file" in refused(model_directory, tmp_path / "none.jsonl", target)
    assert "line 2 is not UTF-8" in refused(model_directory, latin, target)
    assert "exists; choose another, or give --overwrite" in refused(model_directory, source, latin)
    assert "is the input" in refused(model_directory, source, source, "--overwrite")
    folder = tmp_path / "folder"
    assert "is not a file" in refused(model_directory, source, folder, "--overwrite")
    assert "there is no folder" in refused(model_directory, source, tmp_path / "a" / "out.jsonl")
    assert "no such file" in refused(tmp_path / "model", source, target)


def test_an_existing_output_can_be_replaced(run, tmp_path):
    (tmp_path / "1.out.jsonl").write_text("old")
    code, rows = run([{"prompt": "x"}], "--overwrite")
    assert (code, len(rows)) == (0, 1)


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_run_leaves_nothing_behind(run, tmp_path, monkeypatch, error):
    def fail(self, tokens):
        raise error

    monkeypatch.setattr(Runner, "step", fail)
    code, rows = run([{"prompt": "x"}])
    assert (code, rows) == (130 if isinstance(error, KeyboardInterrupt) else 2, [])
    assert [path.name for path in tmp_path.iterdir()] == ["1.in.jsonl"]


def test_the_last_line_says_what_was_done(run, capsys):
    run([{"prompt": "x"}, "{}"])
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert last.startswith("2 rows (1 of them with an error), 9 tokens in ")
    assert "tokens/s; wrote " in last


def test_the_command_line_is_read_before_torch_is_imported():
    code = (
        "import sys, serve.batch\n"
        "try: serve.batch.main(['--help'])\n"
        "finally: assert not {'torch', 'sentencepiece'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--max-new-tokens" in result.stdout
