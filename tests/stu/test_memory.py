"""Free memory, within the limits of control groups."""

import psutil
import pytest

from stu.common.memory import available_bytes

GIB = 2**30


def write_group(folder, limit, used, cache, names):
    folder.mkdir(parents=True, exist_ok=True)
    statistics = f"anon 5\n{names[2]} {cache}"
    files = {names[0]: limit, names[1]: used, "memory.stat": statistics}
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")


def write_own(root, text):
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(text)


NEW = "memory.max", "memory.current", "inactive_file"
OLD = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    memory = psutil.virtual_memory()._replace(available=100 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_the_limit_of_a_group_or_of_one_around_it_holds(tmp_path):
    write_own(tmp_path, "0::/slurm/job_7/step_0\n")
    groups = tmp_path / "sys" / "fs" / "cgroup"
    write_group(groups / "slurm" / "job_7" / "step_0", "max", 3 * GIB, 0, NEW)
    assert available_bytes(tmp_path) == 100 * GIB
    write_group(groups / "slurm" / "job_7", 16 * GIB, 10 * GIB, 2 * GIB, NEW)
    assert available_bytes(tmp_path) == 8 * GIB
    write_group(groups / "slurm" / "job_7" / "step_0", 4 * GIB, 5 * GIB, 0, NEW)
    assert available_bytes(tmp_path) == 0
    write_group(groups / "slurm" / "job_7" / "step_0", 300 * GIB, 5 * GIB, 0, NEW)
    assert available_bytes(tmp_path) == 8 * GIB


def test_a_container_sees_its_group_as_the_root(tmp_path):
    write_own(tmp_path, "0::/\n")
    write_group(tmp_path / "sys" / "fs" / "cgroup", 16 * GIB, 10 * GIB, 0, NEW)
    assert available_bytes(tmp_path) == 6 * GIB


def test_the_first_version_of_groups(tmp_path):
    write_own(tmp_path, "12:pids:/docker/a\n5:memory:/docker/a\n0::/\n")
    groups = tmp_path / "sys" / "fs" / "cgroup" / "memory"
    write_group(groups, 16 * GIB, 10 * GIB, GIB, OLD)  # that of the container
    assert available_bytes(tmp_path) == 7 * GIB


def test_without_groups_the_memory_is_that_of_the_machine(tmp_path):
    assert available_bytes(tmp_path) == 100 * GIB
    write_own(tmp_path, "0::/\n")
    assert available_bytes(tmp_path) == 100 * GIB
