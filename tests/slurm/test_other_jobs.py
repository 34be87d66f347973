"""slurm/generate.sbatch and slurm/serve.sbatch."""

import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serve.conftest import (  # noqa: F401
    code_model,
    code_tokenizer,
    generate,
    model_directory,
    read_rows,
    write_rows,
)
from tests.slurm.conftest import ROOT

HEAD = ["--gpus-per-node=1", "--cpus-per-task=1", "--mem=1G", "--time=10"]
SECONDS = 240
ROWS = [{"id": str(i), "prompt": f"def f{i}(", "max_new_tokens": 40} for i in range(60)]


def until(holds, message):
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, message()
        time.sleep(0.05)


def processes(word):
    """On this machine, whose command has it."""
    return [
        its
        for its in psutil.process_iter(["cmdline"])
        if word in " ".join(its.info["cmdline"] or []) and "python" in its.info["cmdline"][0]
    ]


def is_told_to_end(process):
    """Whether SIGTERM waits until a suspended process can take it."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (waiting,) = re.findall(r"^ShdPnd:\s*(\w+)$", status, re.MULTILINE)
    return bool(int(waiting, 16) >> (signal.SIGTERM - 1) & 1)


def test_an_array_the_time_of_one_task_of_which_is_up(cluster, tmp_path, model_directory):  # noqa: F811
    source, target = tmp_path / "in.jsonl", tmp_path / "of.mine" / "completions"
    target.parent.mkdir()
    write_rows(source, ROWS)
    options = "--cache-gib", "0.01", "--devices", "cpu", "--temperature", "1", "--batch-invariant"
    options += "--max-running", "2"  # so that rows end one after the other
    script = ROOT / "slurm" / "generate.sbatch"
    job = cluster.submit(
        "--array=0-2",
        *HEAD,
        f"--chdir={tmp_path}",
        script,
        model_directory,
        source,
        target,
        *options,
    )

    def log():
        return "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))

    part = target.with_name("completions.1-of-3")
    until(lambda: part.exists() and part.stat().st_size, log)
    (generating,) = processes(f"--output {target} --part 1/3")
    generating.suspend()  # it must not end before the signal arrives
    cluster.call("scancel", "--signal=USR1", "--batch", f"{job}_1")
    until(lambda: is_told_to_end(generating), log)
    generating.resume()
    until(target.exists, log)
    alone = tmp_path / "alone.jsonl"
    assert generate(model_directory, source, alone, *options[2:]) == 0
    # Slurm's own line about the requeue may stand between these two.
    for line in ("stu-generate ended with code 143 after SIGUSR1\n", "\nrequeued: it continues"):
        assert line in log()
    rows = {row["id"]: row for row in read_rows(target)}
    assert len(read_rows(target)) == len(ROWS)
    assert rows == {row["id"]: row for row in read_rows(alone)}
    cluster.call("scancel", job)
    assert not list(target.parent.glob("*.done"))


def test_a_server(cluster, tmp_path, model_directory):  # noqa: F811
    keys = tmp_path / "keys"
    keys.write_text("a-key\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster.environment |= {"STU_API_KEY_FILE": str(keys), "STU_PORT": str(port)}
    script = ROOT / "slurm" / "serve.sbatch"
    options = "--devices", "cpu", "--cache-gib", "0.01"
    job = cluster.submit(*HEAD, f"--chdir={tmp_path}", script, model_directory, *options)

    def log():
        return "\n".join(path.read_text() for path in tmp_path.glob("*.log"))

    until(lambda: "listening on" in log(), log)
    url = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{url}/v1/models").status_code == 401
    headers = {"authorization": "Bearer a-key"}
    body = {"prompt": "def f(", "max_tokens": 40, "stream": True, "stop_at_eos": False}
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=body, headers=headers, timeout=SECONDS
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        cluster.call("scancel", "--signal=TERM", "--batch", job)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert cluster.wait(job, SECONDS) == "COMPLETED", log()


@pytest.fixture(autouse=True)
def same_environment(cluster):
    before = dict(cluster.environment)
    # These jobs are of processes that start as a user's do.
    cluster.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    yield
    cluster.environment.clear()
    cluster.environment |= before
