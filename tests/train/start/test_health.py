"""What `stu-health` finds wrong with a node; the nodes of a job together are in tests/slurm."""

import re

import pytest
import torch

from train.health import cli as health
from train.health.verdict import Answer, folder_problem, folders_of, judge


def test_too_little_memory():
    assert list(health.local_problems(0.001)) == []
    (memory,) = health.local_problems(1e6)
    assert "1e+06 are needed" in memory


def test_folders_that_can_be_written(tmp_path):
    folder = tmp_path / "logs"
    assert list(folder_problem(folder, "first", "first")) == []
    assert list(folder_problem(folder, "first", "second")) == []
    assert [path.name for path in folder.iterdir()] == ["first"]
    (unseen,) = folder_problem(folder, "another", "second")
    assert "does not show what the first node wrote" in unseen
    (tmp_path / "file").touch()
    (unwritable,) = folder_problem(tmp_path / "file" / "logs", "first", "second")
    assert "logs cannot be written" in unwritable


def answers(count, lacking=(), others=(), short=()):
    return [
        Answer(
            f"n{number}",
            ["no memory"] * (number in short),
            {"run": "cannot be written"} if number in lacking else {},
            {"torch": "2" if number in others else "1"},
        )
        for number in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    ("given", "silent", "code", "bad", "told"),
    [
        (answers(2), (), 0, [], None),
        (answers(4, lacking=[3]), (), 1, ["n3"], "n3: cannot be written"),
        (answers(2, lacking=[2]), (), 2, [], "refused, .*: n2: cannot be written"),
        (answers(1, lacking=[1]), (), 2, [], "refused, .*: n1"),
        (answers(4, lacking=[2, 3, 4]), (), 2, [], "refused"),
        (answers(4, others=[2]), (), 1, ["n2"], "n2: torch is 2, and 1 on n1"),
        (answers(2, others=[2]), (), 2, [], "refused, .*: n2: torch is 2, and 1 on n1"),
        (answers(2, short=[1]), (), 1, ["n1"], "n1: no memory"),
        (answers(2, short=[1, 2]), (), 1, ["n1", "n2"], "n2: no memory"),
        (answers(2), ["n3"], 1, ["n3"], None),
    ],
)
def test_what_is_a_nodes_fault(given, silent, code, bad, told):
    """What half of the nodes have otherwise would be no better on others."""
    verdict = judge(given, silent)
    assert (verdict.code, verdict.bad) == (code, bad)
    assert told is None or re.search(told, "\n".join(verdict.told))


def test_settings_say_which_folders_to_look_at(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("run_dir: runs/a\ndata: {dir: data/a}\n")
    for settings, expected in (
        ([], ("runs/train", None)),
        (["--config", str(config)], ("runs/a", "data/a")),
        ([f"--config={config}", "--run-dir", "runs/b"], ("runs/b", "data/a")),
        (["--run-dir=runs/b", f"--config={config}", "--data.dir=x=y"], ("runs/a", "x=y")),
        (["--config=/nowhere.yaml"], ("runs/train", None)),
    ):
        assert folders_of(settings) == expected


@pytest.mark.parametrize("has_gpus", [False, True])
def test_gpus_that_do_not_answer(monkeypatch, has_gpus):
    """A machine that never had one is for the CPU, whatever SLURM calls its GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(health, "_has_nvidia_gpus", lambda: has_gpus)
    problems = list(health.local_problems(0.001))
    assert problems == (["0 GPUs answer of 2 that SLURM gave"] if has_gpus else [])
