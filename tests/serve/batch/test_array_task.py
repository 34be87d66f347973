"""Rows of array tasks, and devices of a run."""

import json
import os
from itertools import chain
from pathlib import Path

import pytest
import torch

from serve.devices import choose_devices
from stu.common.array_task import ArrayTask
from stu.common.errors import UserError
from tests import forked


@pytest.mark.parametrize("text", ["0/3", "1/3", "2/3", "0/1"])
@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_split_divides_the_rows_of_a_task_evenly(text, num_parts):
    task = ArrayTask.parse(text)
    rows = [[number for number in range(300) if number in part] for part in task.split(num_parts)]
    assert sorted(chain(*rows)) == [number for number in range(300) if number in task]
    sizes = [len(numbers) for numbers in rows]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "1/0", "a/b", "0/2/3", " 0/2", ""])
def test_malformed_parts_are_refused(text):
    with pytest.raises(UserError, match="it must be i/n with 0 <= i < n"):
        ArrayTask.parse(text)


def test_each_task_has_its_own_output():
    assert ArrayTask(2, 8).output(Path("a.b/out.jsonl")) == Path("a.b/out.2-of-8.jsonl")
    assert ArrayTask(2, 8).output(Path("out")) == Path("out.2-of-8")
    assert ArrayTask().output(Path("out.jsonl")) == Path("out.jsonl")


def test_tasks_of_a_slurm_step_share_the_rows():
    task = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "9"}
    assert ArrayTask.from_slurm_step(task) == ArrayTask(3, 4)
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    single_task = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    for environment in (batch_script, single_task, {}):
        assert ArrayTask.from_slurm_step(environment) == ArrayTask()


@pytest.mark.parametrize(
    ("num_cuda", "text", "devices"),
    [
        (0, "auto", ["cpu"]),
        (0, "cpu", ["cpu"]),
        (0, "cpu, cpu", ["cpu", "cpu"]),
        (2, "auto", ["cuda:0"]),
        (2, "all", ["cuda:0", "cuda:1"]),
        (2, "1", ["cuda:1"]),
        (2, "cuda:0", ["cuda:0"]),
        (4, "0,cuda:3,cpu", ["cuda:0", "cuda:3", "cpu"]),
    ],
)
def test_devices(monkeypatch, num_cuda, text, devices):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_cuda)
    assert choose_devices(text) == devices


@pytest.mark.parametrize(
    ("num_cuda", "text", "message"),
    [
        (0, "all", 'all" is not allowed: torch sees no CUDA device; choose others, cpu, or auto'),
        (0, "0", '0" is not allowed: torch sees no CUDA device'),
        (2, "0,2", '0,2" is not allowed: torch sees only 2 CUDA devices'),
        (2, "gpu", 'devices="gpu" is not allowed: it must be auto, all, or a list of cpu, 0'),
        (2, "0,", 'devices="0," is not allowed'),
        (2, "", 'devices="" is not allowed'),
        (2, "-1", 'devices="-1" is not allowed'),
        (2, "cpu,auto", 'devices="cpu,auto" is not allowed'),
    ],
)
def test_missing_and_malformed_devices_are_refused(monkeypatch, num_cuda, text, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_cuda)
    with pytest.raises(UserError, match=message):
        choose_devices(text)


def test_tasks_of_one_host_take_one_device_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    for local_task, device in {"0": "cuda:0", "3": "cuda:3"}.items():
        monkeypatch.setenv("SLURM_LOCALID", local_task)
        assert choose_devices("auto") == [device]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_devices("auto") == ["cuda:0"]


@pytest.mark.parametrize("is_same", [True, False])
def test_last_array_task_joins_parts_of_one_job_only(tmp_path, is_same):
    """slurm/generate.sbatch with a stu-generate that does nothing."""
    command = tmp_path / "stu-generate"
    command.write_text("#!/bin/sh\nexit 0\n")
    command.chmod(0o755)
    for index in range(2):
        part = tmp_path / f"out.{index}-of-2.jsonl"
        part.write_text(f'{{"row": {index}}}\n')
        digest = "a" if is_same else "ab"[index]
        job = {"input": f"9 bytes, sha256 {digest}", "part": f"{index}/2", "seed": 0}
        Path(f"{part}.job.json").write_text(json.dumps(job, indent=2) + "\n")
    script = Path(__file__).parents[3] / "slurm" / "generate.sbatch"
    for task in ("0", "1"):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "7"}
        environment |= {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2"}
        command = "bash", script, "model", "in.jsonl", "out.jsonl"
        result = forked.run(*command, folder=tmp_path, **environment)
    whole = tmp_path / "out.jsonl"
    if is_same:
        assert result.returncode == 0, result.stderr
        assert whole.read_text() == '{"row": 0}\n{"row": 1}\n'
    else:
        assert result.returncode == 2
        assert "parts 0 and 1 of out.jsonl are of different jobs" in result.stderr
        assert not whole.exists()
