"""Several engines on one batch, and several runs on one input."""

import json
import signal
import socket
import subprocess
import sys
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
TWO = ["--devices", "cpu,cpu"]


@pytest.fixture
def expected(tmp_path, model_directory, source):
    """The rows, by one engine."""
    path = tmp_path / "expected.jsonl"
    assert generate(model_directory, source, path) == 1
    return in_order(read_rows(path))


def in_order(rows):
    return sorted(rows, key=lambda row: row["row"])


def children(process):
    return process.real.children()


def own_workers():
    """Engines of this process."""
    return [its for its in psutil.Process().children() if "serve.batch.worker" in its.cmdline()]


def test_engines_in_processes_of_their_own_give_the_same_rows(
    model_directory, source, target, expected, monkeypatch, capsys
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert generate(model_directory, source, target, *TWO) == 1
    assert in_order(read_rows(target)) == expected
    assert "60 rows (1 with an error), " in capsys.readouterr().err
    assert own_workers() == []


def test_workers_import_nothing_from_the_current_folder(
    model_directory, source, target, folder_of_namesakes
):
    assert generate(model_directory, source, target, *TWO) == 1
    assert len(read_rows(target)) == len(ROWS)


def test_an_engine_that_cannot_begin_ends_the_run_and_says_why(
    model_directory, source, target, capsys, monkeypatch
):
    monkeypatch.setattr("sys.executable", forked.python())
    assert generate(model_directory, source, target, *TWO, "--cache-gib", "1e-6") == 2
    error = capsys.readouterr().err
    assert "the worker on cpu ended with code 2; its last output: " in error
    assert "--cache-gib=9.993e-07 is too little" in error
    assert own_workers() == []


def test_an_engine_that_dies_ends_the_run_and_it_goes_on_later(
    model_directory, source, target, start
):
    write_rows(source, [{"prompt": "x", "max_new_tokens": 60}] * 300)
    options = [*TWO, "--max-running", "2"]
    process = start(model_directory, source, target, *options)
    wait_for_bytes(process, target, 1)
    victim, other = children(process)
    victim.send_signal(signal.SIGHUP)  # ends none
    victim.kill()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "the worker on cpu was ended by SIGKILL; its last output: none" in error
    assert not other.is_running()
    before = read_rows(target)
    assert f"{len(before):,} rows, and the same command resumes from there" in error
    assert 0 < len(before) < 300
    assert generate(model_directory, source, target) == 0
    after = read_rows(target)
    assert after[: len(before)] == before
    assert [row["row"] for row in in_order(after)] == list(range(300))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_engine_outlives_its_run(model_directory, source, target, start, number):
    write_rows(source, [{"prompt": "x", "max_new_tokens": 60}] * 300)
    process = start(model_directory, source, target, *TWO, "--max-running", "2")
    if number == signal.SIGKILL:
        wait_for_bytes(process, target, 1)
    else:
        while len(children(process)) < 2:  # while they load
            assert process.poll() is None
            time.sleep(0.01)
    workers = children(process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []


def test_a_worker_ends_with_its_stdin_and_not_only_at_its_next_report(
    tmp_path, model_directory, source, target
):
    config = BatchConfig(model_directory, source, target, engine=EngineConfig(cache_gib=0.01))
    digest = InputDigest.of(source)
    decisive = BatchJob(config, digest).model_and_settings()
    work = Work(config, "cpu", ArrayTask(), frozenset(), digest, decisive)
    result = subprocess.run(
        [sys.executable, "-m", "serve.batch.worker"],
        input=json.dumps(work.to_json()) + "\n",
        stdout=subprocess.PIPE,
        text=True,
    )
    assert result.returncode == 1


def test_parts_hold_all_rows_between_them(model_directory, source, target, expected, monkeypatch):
    by_option, by_task = [], []
    for index in range(3):
        generate(model_directory, source, target, "--part", f"{index}/3")
        rows = read_rows(target.with_name(f"out.{index}-of-3.jsonl"))
        assert {row["row"] % 3 for row in rows} == {index}
        by_option += rows
    for index in range(2):
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
        monkeypatch.setenv("SLURM_PROCID", str(index))
        monkeypatch.setenv("SLURM_LOCALID", str(index))
        generate(model_directory, source, target)
        by_task += read_rows(target.with_name(f"out.{index}-of-2.jsonl"))
    assert in_order(by_option) == in_order(by_task) == expected
    assert not target.exists()


def test_errors_of_a_part_name_it_and_its_host(model_directory, source, target, capsys):
    target.with_name("out.1-of-2.jsonl").write_text("something\n")
    assert generate(model_directory, source, target, "--part", "1/2") == 2
    error = capsys.readouterr().err
    assert f"error: part 1/2 on {socket.gethostname()}: output " in error
    assert "out.1-of-2.jsonl: exists, and there is no out.1-of-2.jsonl.job.json" in error
