"""`stu-generate`: rows, settings, errors and exit codes."""

import copy
import json
import os
import re
import sys
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stu.model_dir import save_model
from tests.serve.conftest import generate, rows_in_order, write_rows

ROW_KEYS = [
    *("id", "row", "prompt", "completion", "num_prompt_tokens", "num_completion_tokens"),
    "finish_reason",
]
PROMPTS = ["def f(x):\n", "", "return größe + 1", "x", "\tx = 1\n\ty"]


def completions(result):
    """Return the completions of a run without errors."""
    code, rows = result
    assert code == 0
    return [row["completion"] for row in rows]


def test_greedy_completions_equal_the_forward_pass(run, code_model, code_tokenizer):
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


def test_settings_of_a_row_override_the_command_line_and_that_the_model_directory(run):
    rows = [{"prompt": "x", "max_new_tokens": 3}, {"prompt": "x"}]
    assert [row["num_completion_tokens"] for row in run(rows)[1]] == [3, 9]
    _, with_option = run(rows, "--max-new-tokens", "5")
    assert [row["num_completion_tokens"] for row in with_option] == [3, 5]
    rows = [{"prompt": "x", "temperature": 0}, {"prompt": "x"}]
    greedy, default = completions(run(rows))
    assert greedy == default
    cold, hot = completions(run(rows, "--temperature", "2"))
    assert cold == greedy != hot
    for option in (["--top-k", "1"], ["--top-p", "0.001"]):
        assert completions(run(rows[1:], "--temperature", "2", *option)) == [greedy]


def test_settings_may_come_from_a_config_file(run, tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text("max_new_tokens: 4\nmax_running: 2\nbatch_invariant: true\n")
    _, rows = run([{"prompt": "x"}] * 3, "--config", config)
    assert [row["num_completion_tokens"] for row in rows] == [4, 4, 4]


def test_completions_depend_on_the_seed_and_not_on_the_batch_composition(run):
    rows = [
        {"prompt": prompt, "max_new_tokens": 5 + 3 * number}
        for number, prompt in enumerate(PROMPTS)
    ]
    rows[3] |= {"top_k": 20, "top_p": 0.9}

    def decode(seed, max_running):
        options = ["--temperature", "1.5", "--seed", seed, "--max-running", max_running]
        return completions(run(rows, *options))

    expected = decode("1", "3")
    for max_running in ("1", "2"):
        assert decode("1", max_running) == expected
    for text, other_text in zip(expected, decode("2", "3"), strict=True):
        assert text != other_text


def test_equal_prompts_differ_unless_their_seeds_are_equal(run):
    rows = [{"prompt": "x"}, {"prompt": "x"}, *[{"prompt": "x", "seed": 5}] * 2]
    first, second, third, fourth = completions(run(rows, "--temperature", "1"))
    assert len({first, second, third}) == 3
    assert third == fourth


def test_each_row_stops_at_its_own_eos(run):
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


def test_ids_and_prompts_may_have_any_text(run):
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
    (b'{"prompt": "gr\xf6\xdfe"}', None, ["is not UTF-8; convert the file"]),
    ('{"prompt": "x"', None, ["is not JSON", "write an object on each line"]),
    ("[" * 100_000, None, ["is not JSON that can be read"]),
    ('["x"]', None, ['["x"] is not a JSON object', '{"prompt": "..."}']),
    ("{}", None, ['field "prompt" is missing', "give a string"]),
    (
        '{"prompt": "\\ud800", "id": "k"}',
        "k",
        ["prompt is not allowed: it has half of a surrogate pair"],
    ),
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
    (
        json.dumps({"prompt": "0123456" * 15}),
        None,
        ["max_seq_len=64", "the prompt is too long, sh"],
    ),
    ('{"promt": "x"}', None, ['unknown field "promt"', "did you mean 'prompt'?"]),
    *(
        (f'{{"prompt": "x", {fields}}}', None, parts)
        for fields, parts in [
            (r'"id": "\ud800"', ["id is not allowed: it has half of a surrogate pair"]),
            ('"id": true', ["id=true", "a string or whole number"]),
            ('"id": [1]', ["id=[1]", "a string or whole number"]),
            ('"prompt": 5', ["prompt=5", "must be a string or a list of token ids"]),
            (
                '"prompt": [1, 280]',
                ["prompt is not allowed: it has the id 280, and the vocabulary ids 0 to 279"],
            ),
            ('"prompt": [1, -1]', ["prompt=[1, -1] is not allowed: it must be a string or a list"]),
            ('"topk": 1', ['unknown field "topk"', "did you mean 'top_k'?"]),
            ('"temperature": NaN', ["temperature=NaN", "a finite number >= 0"]),
            ('"temperature": "1"', ['temperature="1"', "a finite number >= 0"]),
            ('"top_k": -3', ["top_k=-3", "a whole number from 0"]),
            ('"top_p": -1', ["top_p=-1", "from 0 (for the most probable token"]),
            ('"seed": 1.5', ["seed=1.5", "from 0 to"]),
            ('"max_new_tokens": -1', ["max_new_tokens=-1", "whole number >= 0"]),
            ('"max_new_tokens": null', ["max_new_tokens=null", ">= 0"]),
            ('"max_new_tokens": 63', ["prompt of 2 tokens", "63 new tokens", "to 62 or short"]),
            ('"best_of": 129', ["best_of=129", "at most 128"]),
            ('"stop": "\\ud800"', ["stop is not allowed: it has half of a surrogate pair"]),
            ('"stop": [""]', ["stop=", "none of them empty"]),
        ]
    ),
]


def test_bad_rows_are_refused_and_change_no_other(run):
    good = [{"prompt": "def", "id": "a"}, {"prompt": "x"}, {"prompt": "f(x)", "id": "z"}]
    code, rows = run([*good[:2], *(line for line, _, _ in BAD_ROWS), good[2]])
    assert code == 1
    for number, (row, (_, row_id, parts)) in enumerate(zip(rows[2:-1], BAD_ROWS, strict=True), 2):
        assert row.keys() == {"id", "row", "error"}
        assert row["id"] == (number if row_id is None else row_id)
        assert row["error"].startswith(f"line {number + 1}: ")
        assert [part for part in parts if part not in row["error"]] == [], row["error"]
    code, alone = run(good)
    assert code == 0
    alone[2]["row"] = len(rows) - 1
    assert [*rows[:2], rows[-1]] == alone


def test_row_whose_logits_are_not_finite_is_refused(tmp_path, code_model, code_tokenizer, capsys):
    damaged = copy.deepcopy(code_model)
    with torch.no_grad():
        damaged.embedding.weight[7] = torch.inf
    save_model(tmp_path / "model", damaged, code_tokenizer, {"max_new_tokens": 3})
    write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}, {"promt": "x"}])
    assert generate(tmp_path / "model", tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 1
    rows = rows_in_order(tmp_path / "out.jsonl")
    assert rows[0]["error"].startswith("line 1: the model's logits are not finite")
    assert rows[1]["error"].startswith("line 2: unknown field")
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert re.match(r"2 rows \(2 with an error\), 0 tokens in .* s, \d+ tokens/s; wrote ", last)


@pytest.mark.skipif(sys.platform == "darwin", reason="its names are UTF-8")
def test_an_error_with_half_of_a_surrogate_pair_is_a_row(model_directory, tmp_path):
    """Names of files and of fields have one where they are not UTF-8."""
    folder = tmp_path / "in"
    folder.mkdir()
    name = os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jsonl")
    Path(name).write_text('{"prompt": "x"}\n{"prompt": 5}\n{"\\ud800": 1}\n')
    assert generate(model_directory, folder, tmp_path / "out.jsonl") == 1
    rows = rows_in_order(tmp_path / "out.jsonl")
    assert rows[0]["completion"]
    assert "caf\udce9.jsonl line 2" in rows[1]["error"]
    assert "unknown field" in rows[2]["error"]


def test_log_probabilities_that_were_asked_for_may_be_none(run):
    asked = {"prompt": "", "logprobs": 1, "prompt_logprobs": 0, "max_new_tokens": 0}
    _, rows = run([asked, {"prompt": "a", "max_new_tokens": 0}])
    assert (rows[0]["logprobs"], rows[0]["prompt_logprobs"]) == ([], [])
    assert not {"logprobs", "prompt_logprobs"} & rows[1].keys()


def test_stop_strings_end_a_completion(run):
    _, (whole,) = run([{"prompt": "x"}])
    stop = whole["completion"][3:5]
    _, (cut,) = run([{"prompt": "x", "stop": ["never", stop]}])
    assert cut["completion"] == whole["completion"].split(stop)[0]
    assert cut["finish_reason"] == "stop"


def test_best_of_writes_the_most_probable_of_several_completions(run, code_model):
    settings = {"prompt": [1, 100, 101], "temperature": 1, "seed": 4, "stop_at_eos": False}
    _, rows = run([{**settings, "best_of": 9, "logprobs": 0}, {**settings, "best_of": 9}])
    _, (first, plain) = run([{**settings, "logprobs": 0}, {**settings, "prompt_logprobs": 1}])
    sums = [sum(token["logprob"] for token in row["logprobs"]) for row in (rows[0], first)]
    assert sums[0] > sums[1]
    assert rows[0]["completion"] == rows[1]["completion"] != plain["completion"]
    assert "logprobs" not in rows[1]
    with torch.no_grad():
        expected = code_model(torch.tensor([settings["prompt"]]))[0].double().log_softmax(-1)
    for values, row, token in zip(plain["prompt_logprobs"], expected, [100, 101], strict=False):
        assert values["token"] == token
        assert values["logprob"] == pytest.approx(row[token].item(), abs=1e-4)
        assert values["rank"] == 1 + (row > row[token]).sum()
        assert len(values["top"]) == 1


def test_logprobs_equal_the_forward_pass(run, code_model, code_tokenizer):
    prompt = [code_tokenizer.bos_id, *code_tokenizer.encode("def")]
    _, (row,) = run([{"prompt": prompt, "logprobs": 3, "temperature": 2, "top_k": 50}])
    tokens = [logprob["token"] for logprob in row["logprobs"]]
    assert len(tokens) == row["num_completion_tokens"] > 0
    with torch.inference_mode():
        logits = code_model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    for logprob, row_logprobs in zip(row["logprobs"], expected, strict=True):
        assert logprob["logprob"] == pytest.approx(row_logprobs[logprob["token"]].item(), abs=1e-4)
        values, indices = row_logprobs.topk(3)
        assert [int(token) for token in logprob["top"]] == indices.tolist()
        assert list(logprob["top"].values()) == pytest.approx(values.tolist(), abs=1e-4)


def test_parquet_rows(tmp_path, model_directory, run):
    table = pa.table({"text": ["x", None, "def"], "key": ["a", "b", "c"], "other": [1, 2, 3]})
    pq.write_table(table, tmp_path / "in.parquet")

    def decode(*options):
        target = tmp_path / "out.jsonl"
        code = generate(model_directory, tmp_path / "in.parquet", target, "--overwrite", *options)
        return code, rows_in_order(target)

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
        (["--devices", "cpu,cpu", "--cache-gib", "null"], "--devices cpu,cpu names a device twice"),
        (["--top", "3"], "did you mean 'top-"),
        (["--topk", "3"], "did you mean 'top-k'?"),
        (["--max_new_tokens", "3"], "did you mean 'max-new-tokens'?"),
        (["--batch-size", "3"], "unrecognized arguments: --batch-size"),
        (["--device", "cpu"], "did you mean 'devices'?"),
        (["--temperature", "warm"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--format", "chat"], "'openai'"),
        (["--config", "settings.yaml"], "did you mean 'top-k'?"),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_written(
    run, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.yaml").write_text("topk: 4\n")
    try:
        code, _ = run([{"prompt": "x"}], *options)
    except SystemExit as stop:  # how a parser stops
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"1.in.jsonl", "settings.yaml"}


def test_unusable_paths_are_refused_and_nothing_is_written(tmp_path, model_directory, capsys):
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
