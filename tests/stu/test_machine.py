"""Free memory and processors, within the limits of control groups."""

import io
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from stu.common import machine
from stu.common.cli import is_live
from stu.common.machine import allowed_bytes, num_processors
from train import gpus

GIB = 2**30


def write_group(folder, limit, used, cache, names):
    folder.mkdir(parents=True, exist_ok=True)
    statistics = f"anon 5\n{names[2]}active_file {cache // 2}"
    statistics += f"\n{names[2]}inactive_file {cache // 2}"
    files = {names[0]: limit, names[1]: used, "memory.stat": statistics}
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


def write_own(root, text):
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(text)


NEW = "memory.max", "memory.current", ""
OLD = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"


@pytest.fixture(autouse=True)
def large_machine(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


def test_the_limit_of_a_group_or_of_one_around_it_holds(tmp_path):
    write_own(tmp_path, "0::/slurm/job_7/step_0\n")
    groups = tmp_path / "sys" / "fs" / "cgroup"
    write_group(groups / "slurm" / "job_7" / "step_0", "max", 3 * GIB, 0, NEW)
    assert allowed_bytes(tmp_path) == math.inf
    write_group(groups / "slurm" / "job_7", 16 * GIB, 10 * GIB, 2 * GIB, NEW)
    assert allowed_bytes(tmp_path) == 8 * GIB
    write_group(groups / "slurm" / "job_7" / "step_0", 4 * GIB, 5 * GIB, 0, NEW)
    assert allowed_bytes(tmp_path) == 0
    write_group(groups / "slurm" / "job_7" / "step_0", 300 * GIB, 5 * GIB, 0, NEW)
    assert allowed_bytes(tmp_path) == 8 * GIB


def test_a_container_sees_its_group_as_the_root(tmp_path):
    write_own(tmp_path, "0::/\n")
    write_group(tmp_path / "sys" / "fs" / "cgroup", 16 * GIB, 10 * GIB, 0, NEW)
    assert allowed_bytes(tmp_path) == 6 * GIB


def test_the_first_version_of_groups(tmp_path):
    write_own(tmp_path, "12:pids:/docker/a\n5:memory:/docker/a\n0::/\n")
    groups = tmp_path / "sys" / "fs" / "cgroup" / "memory"
    write_group(groups, 16 * GIB, 10 * GIB, GIB, OLD)  # that of the container
    assert allowed_bytes(tmp_path) == 7 * GIB


def test_without_groups_the_memory_is_that_of_the_machine(tmp_path):
    assert allowed_bytes(tmp_path) == math.inf
    write_own(tmp_path, "0::/\n")
    assert allowed_bytes(tmp_path) == math.inf


def test_processors_are_those_of_the_group(tmp_path):
    assert num_processors(tmp_path) == 64
    write_own(tmp_path, "0::/pod/container\n")
    pod = tmp_path / "sys" / "fs" / "cgroup" / "pod"
    (pod / "container").mkdir(parents=True)
    (pod / "container" / "cpu.max").write_text("max 100000\n")
    assert num_processors(tmp_path) == 64
    (pod / "cpu.max").write_text("250000 100000\n")
    assert num_processors(tmp_path) == 3
    (pod / "container" / "cpu.max").write_text("50000 100000\n")
    assert num_processors(tmp_path) == 1


def test_processors_of_the_first_version_of_groups(tmp_path):
    write_own(tmp_path, "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n")
    group = tmp_path / "sys" / "fs" / "cgroup" / "cpu"
    group.mkdir(parents=True)
    for quota, count in ((-1, 64), (400_000, 4)):
        (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (group / "cpu.cfs_period_us").write_text("100000\n")
        assert num_processors(tmp_path) == count


def test_processors_of_a_mac_are_the_fast_ones(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    for printed, count in ((b"4\n", 4), (b"", 10)):
        done = SimpleNamespace(stdout=printed)
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        assert num_processors() == count


def test_threads_are_not_more_than_processors(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(machine, "num_processors", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    machine.limit_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    machine.limit_threads()
    assert chosen == [2]


@pytest.mark.parametrize(("term", "live"), [("xterm", True), ("dumb", False), ("unknown", False)])
def test_what_is_shown_on_a_dumb_terminal_is_not_drawn_again(monkeypatch, term, live):
    monkeypatch.setenv("TERM", term)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert is_live(Console(force_terminal=True)) == live
    assert not is_live(Console(file=io.StringIO()))


def test_a_peak_that_the_system_does_not_report_is_0(monkeypatch, tmp_path):
    """An exception would end an epoch, as Lightning takes a StopIteration for its end."""
    (tmp_path / "status").write_text("Name: python\nVmRSS: 100 kB\n")
    monkeypatch.setattr(gpus, "STATUS", tmp_path / "status")
    assert gpus.peak_bytes(torch.device("cpu"), gpus.resident_bytes()) == 0
    assert gpus.resident_bytes() == 102_400
