"""slurm/prepare.sbatch, slurm/generate.sbatch and slurm/serve.sbatch."""

import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import psutil
import pytest

from stu.common.array_task import ArrayTask
from tests import forked
from tests.serve.conftest import generate, read_rows, write_rows
from tests.slurm.cluster import SECONDS, until
from tests.slurm.conftest import ROOT, find_clients, read_logs
from tests.train.token_shards import read_tokens
from train.data.config import PrepareConfig
from train.data.prepare import prepare

HEAD = ["--cpus-per-task=1", "--mem=1G", "--time=10"]
COUNT = 3
ROWS = [{"id": str(i), "prompt": f"def f{i}(", "max_new_tokens": 40} for i in range(45)]
KILL_TASK_1_ONCE = """
import os, signal
if os.environ["SLURM_ARRAY_TASK_ID"] == "1" and "SLURM_RESTART_COUNT" not in os.environ:
    from train.data.shards import SplitWriter
    SplitWriter.finish = lambda writer: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_prepare_repeats_a_killed_task_of_an_array(cluster, tmp_path):
    """It equals one run, though a task is killed before its part is complete."""
    corpus, output, alone = tmp_path / "corpus", tmp_path / "out" / "data", tmp_path / "alone"
    corpus.mkdir()
    for name in range(COUNT):
        rows = [{"text": f"def f_{name}_{i}(x):\n\treturn x + {i * i}\n"} for i in range(100)]
        write_rows(corpus / f"{name}.jsonl", rows)
    (tmp_path / "sitecustomize.py").write_text(KILL_TASK_1_ONCE)
    job = cluster.submit(
        *(f"--array=0-{COUNT - 1}", *HEAD, f"--chdir={tmp_path}"),
        *(f"--export=ALL,PYTHONPATH={tmp_path}", ROOT / "slurm" / "prepare.sbatch"),
        *(corpus, "--output", output, "--vocab-size=320", "--validation-fraction=0.2"),
    )
    for task in range(COUNT):
        assert cluster.wait(f"{job}_{task}") == "COMPLETED", read_logs(tmp_path)
    assert [cluster.restarts(f"{job}_{task}") for task in range(COUNT)] == [0, 1, 0]
    assert "stu-prepare ended with code 137" in read_logs(tmp_path)
    assert {path.name for path in output.parent.iterdir()} == {"data", "data.lock"}
    assert read_logs(tmp_path).count("training the tokenizer") == 1
    prepare(PrepareConfig([str(corpus)], alone, vocab_size=320, validation_fraction=0.2, workers=1))
    assert read_tokens(output) == read_tokens(alone)


def has_pending_sigterm(process):
    """Return whether a suspended process has received SIGTERM."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (pending,) = re.findall(r"^ShdPnd:\s*(\w+)$", status, re.MULTILINE)
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
def test_generate_requeues_a_task_of_an_array_when_its_time_is_up(
    cluster, tmp_path, model_directory
):
    source, target = tmp_path / "in.jsonl", tmp_path / "of.mine" / "completions"
    target.parent.mkdir()
    write_rows(source, ROWS)
    options = "--devices", "cpu", "--temperature", "1", "--batch-invariant"
    job = cluster.submit(
        *(f"--array=0-{COUNT - 1}", *HEAD, "--gpus-per-node=1", f"--chdir={tmp_path}"),
        *(ROOT / "slurm" / "generate.sbatch", model_directory, source, target),
        # With two at a time, rows end one after the other.
        *("--cache-gib", "0.01", "--max-running", "2", *options),
    )

    def log():
        return read_logs(tmp_path)

    part = target.with_name("completions.1-of-3")
    until(lambda: part.exists() and part.stat().st_size, log)
    (client,) = find_clients(str(target), "1/3")
    (process,) = forked.real(client.pid).children()  # it runs in the namespaces of its node
    process.suspend()  # it must not end before the signal arrives
    # A process that has not run since gets SIGTERM, the lower number, before SIGSTOP.
    until(lambda: process.status() == psutil.STATUS_STOPPED, log)
    cluster.call("scancel", "--signal=USR1", "--batch", f"{job}_1")
    until(lambda: has_pending_sigterm(process), log)
    process.resume()
    until(target.exists, log)
    alone = tmp_path / "alone.jsonl"
    assert generate(model_directory, source, alone, *options) == 0
    # Slurm's own line about the requeue may stand between these two.
    for line in ("stu-generate ended with code 143 after SIGUSR1\n", "\nrequeued: it continues"):
        assert line in log()
    rows = read_rows(target)
    assert len(rows) == len(ROWS)
    assert {row["id"]: row for row in rows} == {row["id"]: row for row in read_rows(alone)}
    for task in range(COUNT):
        assert cluster.wait(f"{job}_{task}") == "COMPLETED", log()
    assert not list(target.parent.glob("*.done"))


def run_generate(folder, fake, count, restarts):
    """Run slurm/generate.sbatch as the first task of an array, with a fake stu-generate."""
    fakes = {"stu-generate": fake}
    fakes["scontrol"] = "echo $* >requeued; exit 1"  # or the script would wait for its end
    for name, text in fakes.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    variables = {"ARRAY_JOB_ID": 7, "ARRAY_TASK_ID": 0, "ARRAY_TASK_COUNT": count}
    variables["RESTART_COUNT"] = restarts
    environment = {f"SLURM_{name}": str(value) for name, value in variables.items()}
    environment["PATH"] = f"{folder}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "slurm" / "generate.sbatch"), "model", "in.jsonl", "out.jsonl"]
    options = {"cwd": folder, "capture_output": True, "text": True, "timeout": 60}
    return subprocess.run(command, env=environment, **options)


@pytest.mark.parametrize(("rows", "restarts"), [("", 5), ("", 4), ("{}\n", 9)])
@pytest.mark.parametrize("count", [1, 2])
def test_generate_is_requeued_any_number_of_times_while_it_writes_rows(
    tmp_path, rows, restarts, count
):
    part = ArrayTask(0, count).output(tmp_path / "out.jsonl")
    part.write_text("{}\n")
    fake = f"printf '{rows}' >>{part}; exit 137"
    done = run_generate(tmp_path, fake, count, restarts)
    assert done.returncode == 137, done.stderr
    assert (tmp_path / "requeued").exists() == bool(rows or restarts < 5)
    assert ("not requeued after 5 restarts" in done.stderr) == (not rows and restarts == 5)


def test_generate_with_one_task_has_its_output_at_once(tmp_path):
    fake = "echo {} >out.jsonl; exit 1"  # a row has an error
    done = run_generate(tmp_path, fake, count=1, restarts=0)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.jsonl").read_text() == "{}\n"
    assert not [*tmp_path.glob("*.done"), *tmp_path.glob("*.tmp")]


def test_serve_finishes_running_requests_when_it_is_stopped(cluster, tmp_path, model_directory):
    keys = tmp_path / "keys"
    keys.write_text("a-key\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = cluster.submit(
        *(*HEAD, "--gpus-per-node=1", f"--chdir={tmp_path}"),
        *(f"--export=ALL,STU_API_KEY_FILE={keys},STU_PORT={port}", ROOT / "slurm" / "serve.sbatch"),
        *(model_directory, "--devices", "cpu", "--cache-gib", "0.01"),
    )
    until(lambda: "listening on" in read_logs(tmp_path), lambda: read_logs(tmp_path))
    url = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{url}/v1/models").status_code == 401
    headers = {"authorization": "Bearer a-key"}
    body = {"prompt": "def f(", "max_tokens": 40, "stream": True, "stop_at_eos": False}
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=body, headers=headers, timeout=SECONDS
    ) as response:
        lines = response.iter_lines()
        next(lines)
        cluster.call("scancel", "--signal=TERM", "--batch", job)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert cluster.wait(job) == "COMPLETED", read_logs(tmp_path)
