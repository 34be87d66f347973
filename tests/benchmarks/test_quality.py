"""The benchmark of quality: its peer, its tasks, and how it chooses and keeps runs."""

import dataclasses
import json
import math

import pytest
import torch

from benchmarks import plots, quality_tables, tables
from benchmarks.__main__ import main
from benchmarks.peers.rope_attention import rotated
from benchmarks.training import quality
from benchmarks.training.quality import Options, first_runs
from benchmarks.training.quality_run import register_peer, sized
from benchmarks.training.recall import (
    IGNORED,
    LENGTHS,
    NUM_KEYS,
    NUM_PAIRS,
    NUM_QUESTIONS,
    examples,
)
from stu.common.errors import UserError
from stu.layouts import MIXERS
from stu.model import FlashSTU


@pytest.fixture(autouse=True)
def peer():
    register_peer()
    yield
    del MIXERS["rope"]


@pytest.mark.parametrize("context", [512, 4096])
def test_models_have_as_many_weights(context):
    with torch.device("meta"):
        sizes = [
            FlashSTU(sized(layout, context)).num_parameters()
            for layout in ("stu", "hybrid", "hyena", "rope")
        ]
    assert max(sizes) / min(sizes) < 1.03


def test_scores_of_the_peer_depend_on_distances_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 8, dtype=torch.float64)
    turned = [rotated(x.expand(1, 9, 1, 8))[0, :, 0] for x in (query, key)]
    scores = turned[0] @ turned[1].T
    for distance in range(9):
        expected = sum(
            (query[i] * key[i] + query[i + 4] * key[i + 4]) * math.cos(angle)
            + (query[i] * key[i + 4] - query[i + 4] * key[i]) * math.sin(angle)
            for i, angle in enumerate(distance * 10_000 ** (-i / 4) for i in range(4))
        )
        torch.testing.assert_close(
            scores.diagonal(-distance), expected.expand(9 - distance), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("task", ["recall", "needle"])
def test_each_question_has_one_answer_in_the_text(task):
    tokens, targets = examples(task, 50, torch.Generator().manual_seed(0))
    first = LENGTHS[task] - NUM_QUESTIONS
    assert tokens.shape == targets.shape == (50, LENGTHS[task])
    values = 0
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert answers[:first] == [IGNORED] * first
        text = row[:first]
        assert sum(token < NUM_KEYS for token in text) == NUM_PAIRS[task]
        values += len({token for token in text if NUM_KEYS <= token < 2 * NUM_KEYS})
        for key, answer in zip(row[first:], answers[first:], strict=True):
            assert text.count(key) == 1
            assert text[text.index(key) + 1] == answer
    assert values >= 4 * 50, "so that who knows the values alone is mostly wrong"
    repeated = (targets[:, -1:] == targets[:, first:]).double().mean().item()
    assert repeated == 1 if task == "needle" else repeated < 0.4


def test_rates_are_tried_until_the_best_is_between_others(tmp_path):
    options = Options(tmp_path, minutes=1e-9, texts=("code",))
    (tmp_path / "data-code").mkdir()
    work = quality._Work(options)
    for run in first_runs("stu", ("code", 512), [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3], options):
        loss = abs(math.log(run.learning_rate / 15e-3))
        result = json.dumps({"learning_rate": run.learning_rate, "loss": loss})
        work.path(run).write_text(result)
    for run in first_runs("stu", ("code", 4096), [4e-3, 8e-3, 16e-3, 32e-3], options):
        loss = abs(math.log(run.learning_rate / 9e-3))
        result = json.dumps({"learning_rate": run.learning_rate, "loss": loss})
        work.path(run).write_text(result)
    assert quality.best_rates(work, "stu", options) == {("code", 512): 16e-3, ("code", 4096): 8e-3}
    work.path(first_runs("stu", ("code", 512), [32e-3], options)[0]).unlink()
    assert quality.best_rates(work, "stu", options)["code", 512] == 8e-3, "as time is up"
    only = dataclasses.replace(options, rates=(4e-3,))
    assert set(quality.best_rates(work, "stu", only).values()) == {4e-3}


def test_runs_that_learned_other_tokens_are_refused(tmp_path):
    options = Options(tmp_path, minutes=1e-9, texts=("code",))
    work = quality._Work(options)
    one, other, unknown = first_runs("stu", ("code", 512), [1e-3, 2e-3, 4e-3], options)
    for run, made in ((one, {"data": "1"}), (other, {"data": "2"}), (unknown, {})):
        work.path(run).write_text(json.dumps({"text": "code"} | made))
    assert len(work.done([one, unknown])) == 2
    with pytest.raises(UserError, match="runs that learned the same code"):
        work.done([one, other])


def test_a_table_names_the_commits_of_all_its_runs():
    machine = {"date": "2026-11-29T00:00:00", "processor": "CPU", "torch": "2", "commit": "e" * 40}
    machine["cpu_capability"] = "AVX2"
    assert (
        tables.made_on({"machine": machine}) == "(CPU, AVX2, torch 2, 2026-11-29, commit eeeeeee)"
    )
    result = {"machine": machine, "earlier_machines": [{"commit": "a" * 40}]}
    result |= {"runs": [{}, {"commit": "b" * 40}], "recall": [{"commit": "b" * 40}]}
    assert tables.made_on(result).endswith("commit aaaaaaa, bbbbbbb)")


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("seeds", "11", "at most 10"),
        ("contexts", "[3000]", "a divisor of 4096"),
        ("tokens", "5000", "a multiple of 4096"),
        ("layouts", "[llama]", "one of hybrid, "),
        ("rates", "[]", "one value or more"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(option, value, allowed, tmp_path, capsys):
    assert main(["quality", "--folder", str(tmp_path / "runs"), f"--{option}", value]) == 2
    assert allowed in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_small_run_is_kept(tmp_path, capfd):
    arguments = ["quality", "--folder", str(tmp_path), "--tokens", "8192", "--steps", "2"]
    arguments += ["--seeds", "1", "--texts", "[prose]", "--contexts", "[512]"]
    arguments += ["--layouts", "[rope]"]
    (tmp_path / "prose-512-rope-adamw-0.002-0-8192" / "checkpoints").mkdir(parents=True)
    assert main(arguments) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["missing"] == 0
    assert {run["optimizer"] for run in result["runs"]} == {"adamw", "muon"}
    for run in result["runs"]:
        positions = run["loss_by_position"]
        assert list(positions) == [str(2**power) for power in range(10)]
        assert positions["256"] < math.log(2048) + 1
    assert main([*arguments, "--minutes", "1e-9"]) == 0
    assert json.loads(capfd.readouterr().out)["runs"] == result["runs"]
    recorded, elsewhere = tmp_path / "recorded", tmp_path / "elsewhere"
    recorded.write_text(json.dumps(result))
    arguments += ["--folder", str(elsewhere), "--minutes", "1e-9", "--recorded", str(recorded)]
    assert main(arguments) == 0
    again = json.loads(capfd.readouterr().out)
    assert again.pop("earlier_machines") == [result.pop("machine")]
    assert result.pop("earlier_machines") == []
    del again["machine"]
    assert again == result


def trained(layout, seed, bits, context=4096, optimizer="adamw"):
    run = {"text": "code", "context": context, "layout": layout, "optimizer": optimizer}
    run |= {"seed": seed, "bits_per_byte": bits, "learning_rate": 4e-3}
    return run | {"loss_by_position": {"1": bits, "2": bits / 2}}


def rows(lines):
    """Return the cells of a table below its head."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_tables_show_differences_of_the_same_seeds_and_which_are_not_significant(tmp_path):
    attention = [trained("rope", seed, 2.0 + seed) for seed in range(3)]
    runs = [
        *attention,
        *(trained("stu", seed, 1.9 + seed + 0.001 * seed) for seed in range(3)),
        *(trained("hyena", seed, 2.1 + seed * 1.2) for seed in range(3)),
        *(trained("hybrid", seed, 2.0 + seed) for seed in range(2)),
        trained("rope", 0, 2.0, optimizer="muon"),
        trained("stu", 0, 1.5, optimizer="muon"),
    ]
    result = {"runs": runs, "tried": runs[:1]}
    result["recall"] = [
        {"task": "needle", "layout": "stu", "seed": seed, "learning_rate": rate, "right": right}
        | {"parameters": 1234}
        for seed, rate, right in [(0, 1e-3, 0.2), (0, 3e-3, 0.5), (0, 1e-2, 0.1), (1, 3e-3, 0.25)]
    ]
    lines = quality_tables.losses(result).splitlines()
    assert lines[0].endswith("| code, 4,096, 2 of 3 seeds |")
    assert rows(lines) == [
        # A standard deviation of 0.001 over three differences, times 4.303, over sqrt(3).
        ["STU", "2.901 (-0.099 ± 0.002)"],
        ["hybrid", "2.500 (+0.000 ± 0.000, not significant)"],
        ["Hyena", "3.300 (+0.300 ± 0.497, not significant)"],
        ["attention, RoPE", "3.000"],
    ]
    assert rows(quality_tables.optimizers(result).splitlines()) == [
        ["STU", "2.901 (1.900 to 3.902)", "1.500 (1.500 to 1.500)", "-0.400, one seed"],
        ["hybrid", "2.500 (2.000 to 3.000)", "-", ""],
        ["Hyena", "3.300 (2.100 to 4.500)", "-", ""],
        ["attention, RoPE", "3.000 (2.000 to 4.000)", "2.000 (2.000 to 2.000)", "+0.000, one seed"],
    ]
    recall = quality_tables.recall(result).splitlines()
    assert recall[2:4] == ["| STU | 1,234 | 50%, 25% |", "| hybrid | - | - |"]
    rates = quality_tables.rates(result).splitlines()
    assert rates[-1] == "| attention, RoPE | code, 4,096 | 2.000 |"
    positions = quality_tables.of_positions(result, ("code", 4096, "adamw"), "rope")
    assert positions == {1: 3.0, 2: 1.5}
    plots.draw_quality(result, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
