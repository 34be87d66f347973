"""What `stu-health` finds wrong with a node; the nodes of a job together are in tests/slurm."""

import pytest
import torch

from train import health


def test_a_node_that_is_fit(tmp_path):
    assert list(health.local_problems(tmp_path / "logs", 0.001)) == []
    assert list((tmp_path / "logs").iterdir()) == []


def test_a_folder_that_cannot_be_written_and_too_little_memory(tmp_path):
    (tmp_path / "file").touch()
    folder, memory = health.local_problems(tmp_path / "file" / "logs", 1e6)
    assert "logs cannot be written" in folder
    assert "1e+06 are needed" in memory


@pytest.mark.parametrize("has_gpus", [False, True])
def test_gpus_that_do_not_answer(tmp_path, monkeypatch, has_gpus):
    """A machine that never had one is for the CPU, whatever SLURM calls its GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(health, "_has_nvidia_gpus", lambda: has_gpus)
    problems = list(health.local_problems(tmp_path, 0.001))
    assert problems == (["0 GPUs answer of 2 that SLURM gave"] if has_gpus else [])
