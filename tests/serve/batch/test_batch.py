"""`stu-generate`: its file format, its errors, and what it leaves behind."""

import copy
import json
import subprocess
import sys
from datetime import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stu.model_dir import save_model
from tests.serve.conftest import generate, read_rows, write_rows

ROW_KEYS = [
    "id",
    "row",
    "prompt",
    "completion",
    "num_prompt_tokens",
    "num_completion_tokens",
    "finish_reason",
]
PROMPTS = ["def f(x):\n", "", "return größe + 1", "x", "\tx = 1\n\ty"]
LONG_PROMPT = "".join(chr(ord("0") + i % 7) for i in range(100))


def completions(result):
    code, rows = result
    assert code == 0
    return [row["completion"] for row in rows]


def test_greedy_completions_follow_the_forward_pass(run, code_model, code_tokenizer):
    code, rows = run([{"prompt": prompt} for prompt in PROMPTS], "--stop-at-eos", "false")
    assert code == 0
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["id"] for row in rows] == list(range(len(PROMPTS)))
    for row in rows:
        assert list(row) == ROW_KEYS
        tokens = [code_tokenizer.bos_id, *code_tokenizer.encode(row["prompt"])]
        assert row["num_prompt_tokens"] == len(tokens)
        with torch.inference_mode():
            for _ in range(9):
                tokens.append(code_model(torch.tensor([tokens]))[0, -1].argmax().item())
        new = b"".join(map(code_tokenizer.token_bytes, tokens[-9:]))
        assert row["completion"] == new.decode(errors="replace")
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
    config.write_text("max_new_tokens: 4\nmax_running: 2\nbatch_invariant: true\n")
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
    for max_running in ("1", "2", "3"):
        assert with_options("--seed", "1", "--max-running", max_running) == expected
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
    assert [row["row"] for row in written] == [0, 2, 4]
    assert [row["prompt"] for row in written] == ["日本\u2028語", 'quote " and \\', "\x00"]


def test_no_rows_give_an_empty_file(run):
    assert run([]) == (0, [])


BAD_ROWS = [
    (b'{"prompt": "gr\xf6\xdfe"}', 2, ["is not UTF-8; convert the file"]),
    ('{"prompt": "x"', 2, ["is not JSON", "write an object on each line"]),
    ("[" * 100_000, 2, ["is not JSON that can be read"]),
    ('["x"]', 2, ['["x"] is not a JSON object', '{"prompt": "..."}']),
    ("{}", 2, ['field "prompt" is missing', "give a string"]),
    ('{"prompt": 5}', 2, ["prompt=5", "must be a string or a list of token ids"]),
    ('{"prompt": "\\ud800", "id": "k"}', "k", ["prompt has half of a surrogate pair"]),
    ('{"prompt": "x", "id": "\\ud800"}', 2, ["id has half of a surrogate pair"]),
    ('{"prompt": "x", "id": true}', 2, ["id=true", "a string or whole number"]),
    ('{"prompt": "x", "id": [1]}', 2, ["id=[1]", "a string or whole number"]),
    (
        '{"prompt": "x", "id": "a"}',
        "a",
        ['id="a" is not allowed: line 1 has it already', "give another"],
    ),
    (
        '{"prompt": "x", "id": 1}',
        1,
        ["id=1 is not allowed: line 2 has it already", "its number, from 0"],
    ),
    ('{"promt": "x"}', 2, ['unknown field "promt"', "did you mean 'prompt'?"]),
    ('{"prompt": "x", "topk": 1}', 2, ['unknown field "topk"', "did you mean 'top_k'?"]),
    ('{"prompt": "x", "temperature": NaN}', 2, ["temperature=NaN", "a finite number >= 0"]),
    ('{"prompt": "x", "temperature": "1"}', 2, ['temperature="1"', "a finite number >= 0"]),
    ('{"prompt": "x", "top_k": -3}', 2, ["top_k=-3", "a whole number from 0"]),
    ('{"prompt": "x", "top_p": -1}', 2, ["top_p=-1", "from 0 (for the most probable token"]),
    ('{"prompt": "x", "seed": 1.5}', 2, ["seed=1.5", "from 0 to"]),
    ('{"prompt": "x", "max_new_tokens": -1}', 2, ["max_new_tokens=-1", "whole number >= 0"]),
    ('{"prompt": "x", "max_new_tokens": null}', 2, ["max_new_tokens=null", ">= 0"]),
    (
        '{"prompt": "x", "max_new_tokens": 63}',
        2,
        ["prompt of 2 tokens", "63 new tokens", "max_seq_len=64", "to 62 or short"],
    ),
    (
        json.dumps({"prompt": LONG_PROMPT}),
        2,
        ["of 101 tokens", "max_seq_len=64", "the prompt is too long, shorten it"],
    ),
    ('{"prompt": [1, 280]}', 2, ["prompt has the id 280, and the vocabulary ids 0 to 279"]),
    ('{"prompt": [1, -1]}', 2, ["prompt=[1, -1] is not allowed: it must be a string or a list of"]),
    ('{"prompt": "x", "stop": [""]}', 2, ["stop=", "none of them empty"]),
]


@pytest.mark.parametrize(("line", "row_id", "parts"), BAD_ROWS)
def test_a_bad_row_is_refused_and_the_others_are_not(run, line, row_id, parts):
    good = {"prompt": "def", "id": "a"}, {"prompt": "x"}, {"prompt": "f(x)", "id": "z"}
    code, rows = run([good[0], good[1], line, good[2]])
    assert code == 1
    assert rows[2].keys() == {"id", "row", "error"}
    assert rows[2]["id"] == row_id
    assert rows[2]["error"].startswith("line 3: ")
    for part in parts:
        assert part in rows[2]["error"]
    alone = run(good)[1]
    alone[2]["row"] = 3
    assert [rows[0], rows[1], rows[3]] == alone


def test_a_row_that_needs_more_pages_than_there_are_is_refused(run):
    rows = [{"prompt": "x", "max_new_tokens": 60}, {"prompt": "x"}]
    few_pages = ["--cache-gib", "1.1e-5", "--max-running", "1", "--page-len", "8"]
    code, (long, short) = run(rows, *few_pages)
    assert code == 1
    assert "line 1: a prompt of 2 tokens and 60 new tokens need 8 convo" in long["error"]
    assert short["num_completion_tokens"] == 9


def test_a_row_whose_logits_are_not_finite_is_refused(tmp_path, code_model, code_tokenizer, capsys):
    damaged = copy.deepcopy(code_model)
    with torch.no_grad():
        damaged.embedding.weight[7] = torch.inf
    save_model(tmp_path / "model", damaged, code_tokenizer, {"max_new_tokens": 3})
    write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}, {"promt": "x"}])
    assert generate(tmp_path / "model", tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 1
    rows = sorted(read_rows(tmp_path / "out.jsonl"), key=lambda row: row["row"])
    assert rows[0]["error"].startswith("line 1: the model's logits are not finite")
    assert rows[1]["error"].startswith("line 2: unknown field")
    assert "2 rows (2 with an error)" in capsys.readouterr().err


def test_a_prompt_may_fill_the_context(run):
    code, rows = run([{"prompt": "x", "max_new_tokens": 62}], "--stop-at-eos", "false")
    assert (code, rows[0]["num_completion_tokens"]) == (0, 62)


def test_stop_strings_end_a_completion_before_them(run):
    _, (whole,) = run([{"prompt": "x"}])
    stop = whole["completion"][3:5]
    _, (cut,) = run([{"prompt": "x", "stop": ["never", stop]}])
    assert cut["completion"] == whole["completion"].split(stop)[0]
    assert cut["finish_reason"] == "stop"


def test_logprobs_are_those_of_the_model(run, code_model, code_tokenizer):
    prompt = [code_tokenizer.bos_id, *code_tokenizer.encode("def")]
    _, (row,) = run([{"prompt": prompt, "logprobs": 3, "temperature": 2, "top_k": 50}])
    tokens = [its["token"] for its in row["logprobs"]]
    assert len(tokens) == row["num_completion_tokens"] > 0
    with torch.inference_mode():
        logits = code_model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    for at, its in enumerate(row["logprobs"]):
        assert its["logprob"] == pytest.approx(expected[at, tokens[at]].item(), abs=1e-4)
        values, indices = expected[at].topk(3)
        assert [int(token) for token in its["top"]] == indices.tolist()
        assert list(its["top"].values()) == pytest.approx(values.tolist(), abs=1e-4)


def test_parquet(tmp_path, model_directory, run):
    table = pa.table({"text": ["x", None, "def"], "key": ["a", "b", "c"], "other": [1, 2, 3]})
    pq.write_table(table, tmp_path / "in.parquet")

    def decode(*options):
        target = tmp_path / "out.jsonl"
        code = generate(model_directory, tmp_path / "in.parquet", target, "--overwrite", *options)
        return code, sorted(read_rows(target), key=lambda row: row["row"])

    code, rows = decode("--column", "text", "--id-column", "key")
    assert code == 1
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert rows[1]["error"].startswith("row 1: prompt=null is not allowed")
    completions = [row["completion"] for row in run([{"prompt": "x"}, {"prompt": "def"}])[1]]
    assert [rows[0]["completion"], rows[2]["completion"]] == completions
    assert [row["id"] for row in decode("--column", "text")[1]] == [0, 1, 2]
    table = pa.table({"text": [b"\x80", b"def"], "when": [datetime(2026, 1, 1)] * 2})
    pq.write_table(table, tmp_path / "in.parquet")
    errors = [row["error"] for row in decode("--column", "text", "--id-column", "when")[1]]
    assert errors[0].startswith('row 0: id="datetime.datetime(2026, 1, 1, 0, 0)" is not allowed')
    errors = [row["error"] for row in decode("--column", "text")[1]]
    assert errors[0].startswith("row 0: prompt=\"b'\\\\x80'\" is not allowed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "--temperature=-1.0 is not allowed"),
        (["--top-p", "7"], "--top-p=7.0 is not allowed"),
        (["--max-new-tokens", "-1"], "--max-new-tokens=-1 is not allowed"),
        (["--max-running", "0"], "--max-running=0 is not allowed: it must be a whole number >= 1"),
        (["--page-len", "3"], "--page-len=3 is not allowed: it must be a power of two"),
        (["--column", "text"], '--column="text" is not allowed: it is for Parquet'),
        (["--part", "2/2"], '--part="2/2" is not allowed: it must be i/n with 0 <= i < n'),
        (["--devices", "gpu"], '--devices="gpu" is not allowed: it must be auto, all, or'),
        (["--devices", "cuda:99"], '--devices="cuda:99" is not allowed: torch sees'),
    ],
)
def test_settings_that_are_not_allowed(run, tmp_path, capsys, options, message):
    assert run([{"prompt": "x"}], *options) == (2, [])
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["1.in.jsonl"]


def test_a_device_named_twice_needs_a_cache_size(run, capsys):
    assert run([{"prompt": "x"}], "--devices", "cpu,cpu", "--cache-gib", "null") == (2, [])
    assert "--devices cpu,cpu names a device twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top", "3"], "did you mean 'top-"),
        (["--topk", "3"], "did you mean 'top-k'?"),
        (["--max_new_tokens", "3"], "did you mean 'max-new-tokens'?"),
        (["--batch-size", "3"], "unrecognized arguments: --batch-size"),
        (["--device", "cpu"], "did you mean 'devices'?"),
        (["--temperature", "warm"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--format", "chat"], "'openai'"),
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


def test_files_that_cannot_be_used(tmp_path, model_directory, capsys):
    source, other = tmp_path / "in.jsonl", tmp_path / "other.jsonl"
    write_rows(source, [{"prompt": "x"}])
    write_rows(other, [{"prompt": "x"}])
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())

    def refused(model, source, target, *options):
        assert generate(model, source, target, *options) == 2
        assert sorted(tmp_path.iterdir()) == before
        return capsys.readouterr().err

    target = tmp_path / "out.jsonl"
    assert "no such file" in refused(model_directory, tmp_path / "none.jsonl", target)
    assert "exists, and there is no other.jsonl.job.json" in refused(model_directory, source, other)
    assert "is the input" in refused(model_directory, source, source, "--overwrite")
    folder = tmp_path / "folder"
    assert "is not a file" in refused(model_directory, source, folder, "--overwrite")
    assert "there is no folder" in refused(model_directory, source, tmp_path / "a" / "out.jsonl")
    assert "no such file" in refused(tmp_path / "model", source, target)


def test_the_last_line_says_what_was_done(run, capsys):
    run([{"prompt": "x"}, "{}"])
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert last.startswith("2 rows (1 with an error), 9 tokens in ")
    assert "tokens/s; wrote " in last


def test_the_command_line_is_read_before_torch_is_imported():
    code = (
        "import sys, serve.batch.cli\n"
        "try: serve.batch.cli.main(['--help'])\n"
        "finally: assert not {'torch', 'sentencepiece'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for option in ("--max-new-tokens", "--cache-gib", "--batch-invariant"):
        assert option in result.stdout
