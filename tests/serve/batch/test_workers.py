"""Batches decoded by several workers, and by several array tasks."""

import json
import signal
import socket
import subprocess
import time

import psutil
import pytest

from serve.batch.config import BatchConfig
from serve.batch.job import BatchJob
from serve.batch.source import InputDigest
from serve.batch.worker import Work
from serve.config import EngineConfig
from stu.common.array_task import ArrayTask
from tests import forked
from tests.serve.conftest import generate, read_rows, wait_for_bytes, write_rows

ROWS = [{"prompt": "def f(x)"[: number % 9], "seed": number} for number in range(60)]
ROWS[31] = {"promt": "x"}
MANY_ROWS = [{"prompt": "x", "max_new_tokens": 60}] * 100
TWO = ["--devices", "cpu,cpu"]


def in_order(rows):
    return sorted(rows, key=lambda row: row["row"])


def children(process):
    return process.real.children()


def own_workers():
    """Return worker processes of this process."""
    processes = psutil.Process().children()
    return [process for process in processes if "serve.batch.worker" in process.cmdline()]


def test_workers_write_the_same_rows_and_import_nothing_from_the_current_folder(
    model_directory, source, target, expected, folder_of_namesakes, monkeypatch, capsys
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert generate(model_directory, source, target, *TWO) == 1
    assert in_order(read_rows(target)) == expected
    assert "60 rows (1 with an error), " in capsys.readouterr().err
    assert own_workers() == []


def test_worker_that_cannot_start_ends_the_run_with_its_error(
    model_directory, source, target, capsys, monkeypatch
):
    monkeypatch.setattr("sys.executable", forked.python())
    assert generate(model_directory, source, target, *TWO, "--cache-gib", "1e-6") == 2
    error = capsys.readouterr().err
    assert "the worker on cpu ended with code 2; its last output: " in error
    assert "--cache-gib=9.993e-07 is too little" in error
    assert own_workers() == []


def test_run_whose_worker_died_ends_and_resumes(model_directory, source, target, start):
    write_rows(source, MANY_ROWS)
    process = start(model_directory, source, target, *TWO, "--max-running", "2")
    wait_for_bytes(process, target, 1)
    victim, other = children(process)
    victim.send_signal(signal.SIGHUP)  # workers ignore it
    victim.kill()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "the worker on cpu was ended by SIGKILL; its last output: none" in error
    assert not other.is_running()
    before = read_rows(target)
    assert f"{len(before):,} rows, and the same command resumes from there" in error
    assert 0 < len(before) < len(MANY_ROWS)
    assert generate(model_directory, source, target) == 0
    after = read_rows(target)
    assert after[: len(before)] == before
    assert [row["row"] for row in in_order(after)] == list(range(len(MANY_ROWS)))


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT]
)
def test_no_worker_outlives_its_run(model_directory, source, target, start, number):
    write_rows(source, MANY_ROWS)
    process = start(model_directory, source, target, *TWO, "--max-running", "2")
    if number == signal.SIGKILL:
        wait_for_bytes(process, target, 1)
    else:
        while len(children(process)) < 2:  # they load the model then
            assert process.poll() is None
            time.sleep(0.01)
    workers = children(process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []


def test_worker_ends_when_its_stdin_does(tmp_path, model_directory, source, target):
    config = BatchConfig(model_directory, source, target, engine=EngineConfig(cache_gib=0.01))
    digest = InputDigest.of(source)
    decisive = BatchJob.of_files(config, digest).model_and_settings()
    work = Work(config, "cpu", ArrayTask(), frozenset(), digest, decisive)
    result = subprocess.run(
        [forked.python(), "-m", "serve.batch.worker"],
        input=json.dumps(work.to_json()) + "\n",
        stdout=subprocess.PIPE,
        text=True,
    )
    assert result.returncode == 1


def test_parts_together_have_all_rows(model_directory, source, target, expected, monkeypatch):
    from_options, from_tasks = [], []
    for index in range(3):
        generate(model_directory, source, target, "--part", f"{index}/3")
        rows = read_rows(target.with_name(f"out.{index}-of-3.jsonl"))
        assert {row["row"] % 3 for row in rows} == {index}
        from_options += rows
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    for index in range(2):
        monkeypatch.setenv("SLURM_PROCID", str(index))
        monkeypatch.setenv("SLURM_LOCALID", str(index))
        generate(model_directory, source, target)
        from_tasks += read_rows(target.with_name(f"out.{index}-of-2.jsonl"))
    assert in_order(from_options) == in_order(from_tasks) == expected
    assert not target.exists()


def test_errors_of_an_array_task_name_its_part_and_host(model_directory, source, target, capsys):
    target.with_name("out.1-of-2.jsonl").write_text("something\n")
    assert generate(model_directory, source, target, "--part", "1/2") == 2
    error = capsys.readouterr().err
    assert f"error: part 1/2 on {socket.gethostname()}: output " in error
    assert "out.1-of-2.jsonl: exists, and there is no out.1-of-2.jsonl.job.json" in error
