"""`stu-health` finds nodes that are not fit. Tests of Slurm run it on the nodes of a job."""

import re
from pathlib import Path

import pytest
import torch

from train.health import cli, node
from train.health.verdict import Report, judge


def test_too_little_memory_is_a_problem():
    assert list(node.local_problems(0.001)) == []
    (memory,) = node.local_problems(1e6)
    assert "1e+06 are needed" in memory


def test_folder_must_be_shared_and_writable(tmp_path):
    folder = tmp_path / "logs"
    assert node.folder_problem(folder, "first", "first") == ""
    assert node.folder_problem(folder, "first", "second") == ""
    assert [path.name for path in folder.iterdir()] == ["first"]
    unseen = node.folder_problem(folder, "another", "second")
    assert "does not show what the first node wrote" in unseen
    (tmp_path / "file").touch()
    unwritable = node.folder_problem(tmp_path / "file" / "logs", "first", "second")
    assert "logs cannot be written" in unwritable


def reports(count, lacking=(), others=(), short=()):
    return [
        Report(
            f"n{number}",
            ["no memory"] * (number in short),
            {"run": "cannot be written"} if number in lacking else {},
            {"torch": "2" if number in others else "1"},
        )
        for number in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    ("received", "silent", "code", "bad_nodes", "problems"),
    [
        (reports(2), (), 0, [], None),
        (reports(4, lacking=[3]), (), 1, ["n3"], "n3: cannot be written"),
        (reports(2, lacking=[2]), (), 2, [], "refused, .*: n2: cannot be written"),
        (reports(1, lacking=[1]), (), 2, [], "refused, .*: n1"),
        (reports(4, lacking=[2, 3, 4]), (), 2, [], "refused"),
        (reports(4, others=[2]), (), 1, ["n2"], "n2: torch is 2, but 1 on n1"),
        (reports(2, others=[2]), (), 2, [], "refused, .*: n2: torch is 2, but 1 on n1"),
        (reports(2, short=[1]), (), 1, ["n1"], "n1: no memory"),
        (reports(2, short=[1, 2]), (), 1, ["n1", "n2"], "n2: no memory"),
        (reports(2), ["n3"], 1, ["n3"], None),
        (reports(1), ["n2"], 1, ["n2"], None),
        (reports(1), ["n2", "n3"], 1, ["n1"], "n1: 2 of 3 nodes did not reach it"),
        (reports(2, short=[2]), ["n3", "n4", "n5"], 1, ["n1", "n2"], "n1: 3 of 5"),
    ],
)
def test_verdict(received, silent, code, bad_nodes, problems):
    """A problem that half of the nodes have is not the fault of a node."""
    verdict = judge(received, silent)
    assert (verdict.code, verdict.bad_nodes) == (code, bad_nodes)
    assert problems is None or re.search(problems, "\n".join(verdict.problems))


def test_folders_are_read_from_settings(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("run_dir: runs/a\ndata: {dir: data/a}\n")
    for settings, expected in (
        ([], ("runs/train", None)),
        (["--config", str(config)], ("runs/a", "data/a")),
        ([f"--config={config}", "--run-dir", "runs/b"], ("runs/b", "data/a")),
        (["--run-dir=runs/b", f"--config={config}", "--data.dir=x=y"], ("runs/a", "x=y")),
        (["--config=/nowhere.yaml"], ("runs/train", None)),
    ):
        run_dir, data_dir = expected
        assert node.folders_of(settings) == (Path(run_dir), data_dir and Path(data_dir))


@pytest.mark.parametrize("has_gpus", [False, True])
def test_gpus_that_do_not_respond(monkeypatch, has_gpus):
    """A machine without GPUs is meant for the CPU, though Slurm may name some."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(node, "_has_nvidia_gpus", lambda: has_gpus)
    problems = list(node.local_problems(0.001))
    assert problems == (["0 of 2 GPUs that SLURM assigned respond"] if has_gpus else [])


def test_each_gpu_that_raises_an_error_is_a_problem(monkeypatch):
    def memory(number):
        if number == 1:
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error\nCompile with ..")
        return 9, 10

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    (problem,) = node.local_problems(0.001)
    assert problem == "GPU 1 does not respond (CUDA error: uncorrectable ECC error)"


@pytest.mark.parametrize("count", [1, 2])
def test_node_that_does_not_report_is_bad(monkeypatch, capsys, tmp_path, count):
    monkeypatch.setenv("SLURM_NTASKS", str(count))
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert cli.check(tmp_path, 0.001, timeout_seconds=2.0) == count - 1
    printed = capsys.readouterr().err
    assert ("stu-health: all nodes are fit (1)" in printed) == (count == 1)
    assert ("stu-health: bad node: 127.0.0.1" in printed) == (count == 2)
    assert ("127.0.0.1: no answer within 2 seconds" in printed) == (count == 2)
    assert not list(tmp_path.iterdir())
