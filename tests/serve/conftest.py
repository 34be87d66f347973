"""A small model directory, `stu-generate` on it, and a server of it."""

import contextlib
import gc
import json
import os
import socket
import subprocess
import threading
import time
from dataclasses import asdict

import pytest
import torch

from serve.batch.cli import main
from serve.config import EngineConfig
from serve.server.replicas.process import Replica
from serve.wire import Unpacker, pack
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.model_dir import save_model
from tests import forked
from tests.serve.server_process import SECONDS, eventually, serving

MAX_SEQ_LEN, LONG_SEQ_LEN = 64, 8192


@pytest.fixture(autouse=True, scope="module")
def no_slurm():
    """Hide a SLURM step that the tests run in."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [*os.environ]:
            if name.startswith("SLURM_"):
                patch.delenv(name)
        yield


@pytest.fixture
def source(request, tmp_path):
    """An input with the test module's ROWS."""
    path = tmp_path / "in.jsonl"
    write_rows(path, request.module.ROWS)
    return path


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture(scope="module")
def expected(request, tmp_path_factory, model_directory):
    """Rows written for the test module's ROWS by one engine in this process."""
    folder = tmp_path_factory.mktemp("expected")
    write_rows(folder / "in.jsonl", request.module.ROWS)
    assert generate(model_directory, folder / "in.jsonl", folder / "out.jsonl") in (0, 1)
    return rows_in_order(folder / "out.jsonl")


@pytest.fixture(scope="session")
def code_model(code_tokenizer):
    return make_model(code_tokenizer, MAX_SEQ_LEN)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory, code_model, code_tokenizer):
    path = tmp_path_factory.mktemp("export") / "model"
    save_model(path, code_model, code_tokenizer, {"max_new_tokens": 9})
    return path


@pytest.fixture(scope="session")
def long_model_directory(tmp_path_factory, code_tokenizer):
    """A model with a context of `LONG_SEQ_LEN`, for completions that take a while."""
    path = tmp_path_factory.mktemp("long") / "model"
    model = make_model(code_tokenizer, LONG_SEQ_LEN)
    save_model(path, model, code_tokenizer, {"max_new_tokens": 9})
    return path


def make_model(tokenizer, max_seq_len):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        num_layers=4,
        num_filters=6,
        num_heads=2,
        window_tokens=7,
        max_seq_len=max_seq_len,
    )
    return FlashSTU(config).eval()


@pytest.fixture(scope="session")
def server(model_directory):
    """A server that no test may leave with a fault, a request or a page."""
    with serving(model_directory, "--batch-invariant") as server:
        yield server
        eventually(lambda: server.metric("vllm:num_requests_running") == 0)
        assert server.pages_used() == 0
        assert server.metric("stu:replica_restarts_total") == 0
        assert server.stop() == 0
        assert not [line for line in server.lines if '"error"' in line]


@pytest.fixture
def run(tmp_path, model_directory):
    """Return a function of rows (or raw lines) and options that runs `stu-generate` and returns the
    exit code and the written rows in the order of the input."""
    num_calls = 0

    def call(rows, *options):
        nonlocal num_calls
        num_calls += 1
        source, target = tmp_path / f"{num_calls}.in.jsonl", tmp_path / f"{num_calls}.out.jsonl"
        write_rows(source, rows)
        code = generate(model_directory, source, target, *options)
        return code, rows_in_order(target) if target.exists() else []

    return call


def generate(*arguments):
    """Run `stu-generate MODEL INPUT OUTPUT ...` in this process and return the exit code."""
    model, source, target, *options = map(str, arguments)
    return main([model, "--input", source, "--output", target, "--cache-gib", "0.01", *options])


@pytest.fixture
def start(monkeypatch):
    """`generate` as a process, which is killed with its children at the end of the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    processes = []

    def call(*arguments):
        model, source, target, *options = map(str, arguments)
        command = [forked.python(), "-m", "serve.batch.cli", model, "--input", source]
        command += ["--output", target, "--cache-gib", "0.01", *options]
        processes.append(forked.Popen(command, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield call
    for process in processes:
        if process.poll() is None:
            for child in process.real.children():
                child.kill()
            process.kill()
        process.communicate()


def wait_for_bytes(process, path, num_bytes):
    """Wait until `path` has `num_bytes`, or `process` has ended, for a minute at most."""
    deadline = time.monotonic() + 60
    while process.poll() is None and not (path.exists() and path.stat().st_size >= num_bytes):
        assert time.monotonic() < deadline, f"{path} does not grow"
        time.sleep(0.002)


def write_rows(path, rows):
    """Write rows, which may be objects or lines as text or bytes."""
    lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    lines = [line if isinstance(line, bytes) else line.encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def rows_in_order(path):
    """Return the rows of an output in the order of the input."""
    return sorted(read_rows(path), key=lambda row: row.get("row", row["id"]))


def read_rows(path):
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n"), "the last line is whole"
    return [json.loads(line) for line in text.splitlines()]  # as many readers of JSONL do


@pytest.fixture(scope="session")
def patched(tmp_path_factory):
    """Call with code: the environment of a server whose processes run it first."""

    def environment(code):
        folder = tmp_path_factory.mktemp("patched")
        (folder / "sitecustomize.py").write_text(code)
        return {"PYTHONPATH": str(folder)}

    return environment


@pytest.fixture
def replica(model_directory):
    """Functions to send a message to a replica in a thread, and to return its next message that
    has a field."""
    ours, theirs = socket.socketpair()
    ours.settimeout(SECONDS)

    def run():
        with contextlib.suppress(SystemExit, ConnectionError), theirs:  # when this end closes
            Replica(theirs).run()

    def messages():
        unpacker = Unpacker()
        while True:
            yield from unpacker.feed(ours.recv(2**16))

    received = messages()
    thread = threading.Thread(target=run)
    thread.start()
    with ours:
        settings = {"model": str(model_directory), "device": "cpu", "dtype": "float32"}
        ours.sendall(pack({**settings, "engine": asdict(EngineConfig(cache_gib=0.01))}))
        assert "ready" in next(received)
        yield (
            lambda message: ours.sendall(pack(message)),
            lambda field: next(message for message in received if message.get(field)),
        )
    thread.join(SECONDS)
    assert not thread.is_alive()
    gc.unfreeze()
