"""`stu-generate --ray`."""

import subprocess
import threading

import psutil
import pytest

from tests import forked
from tests.serve.conftest import generate, read_rows, rows_in_order, write_rows
from tests.serve.ray.conftest import ray_cluster
from tests.serve.server_process import eventually

pytestmark = pytest.mark.slow
ROWS = [{"id": f"r{n}", "prompt": f"def f{n}(", "max_new_tokens": 1 + n % 9} for n in range(40)]
NUM_ROWS, NUM_KILLS = 5000, 5
ACTOR = "RowDecoder"
"""Part of the name that Ray gives the processes of actors that decode."""


def test_rows_equal_those_of_one_engine_on_this_machine_whose_output_is_resumed(
    model_directory, tmp_path
):
    folder = tmp_path / "in"
    folder.mkdir()
    write_rows(folder / "a.jsonl", [*ROWS[:15], "", {"prompt": 5}, "not JSON"])
    write_rows(folder / "b.jsonl", ROWS[15:])
    alone, target = tmp_path / "alone.jsonl", tmp_path / "out.jsonl"
    options = "--batch-invariant", "--temperature", "1"
    assert generate(model_directory, folder, alone, *options) == 1
    lines = alone.read_text().splitlines(keepends=True)
    target.write_text("".join(lines[:10]))
    job = alone.with_name("alone.jsonl.job.json").read_text()
    target.with_name("out.jsonl.job.json").write_text(job)
    with ray_cluster(num_cpus=2):
        assert generate(model_directory, folder, target, *options, "--ray") == 1
    assert rows_in_order(target) == rows_in_order(alone)


def actors():
    """Processes of actors that decode, of the cluster that this process started."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if ACTOR in " ".join(cmdline(process))]


def cmdline(process):
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def test_each_row_is_written_once_though_workers_a_node_and_the_run_itself_are_killed(
    model_directory, tmp_path
):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, [{"id": f"r{n}", "prompt": f"def f{n}("} for n in range(NUM_ROWS)])
    options = "--max-new-tokens", "3"
    with ray_cluster(num_cpus=1) as cluster:
        node = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        command = [forked.python(), "-m", "serve.batch.cli", model_directory, "--input", source]
        command += ["--output", target, "--cache-gib", "0.01", *options, "--ray"]
        process = forked.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
        eventually(lambda: target.exists() and target.stat().st_size > 20_000, 500)
        process.kill()
        print(process.communicate())
        num_before = len(target.read_text().splitlines())
        killed = []

        def kill():
            for number in range(NUM_KILLS):
                size = target.stat().st_size
                eventually(lambda size=size: target.stat().st_size > size + 10_000, 500)
                victim = actors()[0]
                victim.kill()
                killed.append(victim.pid)
                if number == 2:
                    cluster.remove_node(node, allow_graceful=False)

        killer = threading.Thread(target=kill)
        killer.start()
        assert generate(model_directory, source, target, *options, "--ray") == 0
        killer.join()
    assert len(killed) == NUM_KILLS
    rows = read_rows(target)
    print(f"{num_before} rows before the run was killed, {len(rows)} in all")
    assert 0 < num_before < NUM_ROWS
    assert sorted(row["row"] for row in rows) == [*range(NUM_ROWS)]
    assert all(row["id"] == f"r{row['row']}" for row in rows)
