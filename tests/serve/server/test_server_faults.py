"""Engines that are killed or stopped, and clients that go away: no stream is lost or changed."""

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from serve.sampling_params import Constraint, SamplingParams
from serve.server.replicas import supervisor
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.supervisor import ReplicasConfig
from serve.wire import request_to_wire
from tests import forked
from tests.serve.requests import decode, make_request
from tests.serve.server_process import SECONDS, eventually, serving

PROMPT = [1, 100, 101, 102]
NUM_TOKENS = 55
ENGINE = "serve.server.replicas.process"
NO_REPLICA = "no replica could be started: replica 0 of model on cpu ended with code 2"
NO_PAUSES = "from serve.server.replicas import supervisor; supervisor.LONGEST_PAUSE_SECONDS = 0"


def body(seed, **more):
    settings = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 1, "seed": seed}
    return {**settings, "stop_at_eos": False, "stream": True, "logprobs": 1, **more}


def undisturbed(model, tokenizer, seeds):
    """Text and log probabilities of each seed's request, as an engine alone decodes them."""
    params = [SamplingParams(temperature=1, seed=seed, logprobs=1) for seed in seeds]
    requests = [make_request(PROMPT, NUM_TOKENS, sampling) for sampling in params]
    completions = decode(model, tokenizer, requests, batch_invariant=True)
    return [(done.text, [token.logprob for token in done.logprobs]) for done in completions]


async def pieces(client, seed):
    """Yield the choices of a streamed completion as they come."""
    async with client.stream("POST", "/v1/completions", json=body(seed)) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return
            if line:
                piece = json.loads(line.removeprefix("data: "))
                assert "error" not in piece, piece
                yield piece["choices"][0]
    raise AssertionError("the stream ended without [DONE]")


def counters(server):
    """The values of all counters by name and labels, and the sum of each name."""
    text = server.get("/metrics").text
    found = {}
    for line in text.splitlines():
        series, _, value = line.rpartition(" ")
        name = series.partition("{")[0]
        if name.endswith(("_total", "_count", "_sum", "_bucket")) and not line.startswith("#"):
            found[series] = float(value)
            found[name] = found.get(name, 0) + float(value)
    return found


def ready(server):
    return server.metric("stu:replicas_ready")


@pytest.mark.parametrize(
    ("count", "num_kills"), [(20, 2), pytest.param(500, 20, marks=pytest.mark.slow)]
)
def test_killed_replicas_change_no_stream(
    model_directory, code_model, code_tokenizer, count, num_kills
):
    """To the last bit of every log probability."""
    options = "--replicas", 2, "--max-running", 8, "--batch-invariant", "--max-waiting", 600
    with serving(model_directory, *options) as server:
        eventually(lambda: ready(server) == 2)
        num_tokens, streams, killed = 0, [], []

        async def read(client, seed):
            nonlocal num_tokens
            text, logprobs = "", []
            async for choice in pieces(client, seed):
                text += choice["text"]
                logprobs += choice["logprobs"]["token_logprobs"]
                num_tokens += len(choice["logprobs"]["token_logprobs"])
            return text, logprobs

        async def kill_replicas():
            # Streams advance between two kills, on the slowest machine too.
            while len(killed) < num_kills:
                await asyncio.sleep(0.01)
                assert not any(stream.done() and stream.exception() for stream in streams)
                if num_tokens >= (len(killed) + 1) * count * NUM_TOKENS / (num_kills + 1):
                    with contextlib.suppress(psutil.NoSuchProcess):  # one that was killed before
                        alive = [replica for replica in server.replicas() if replica not in killed]
                        for oldest in sorted(alive, key=psutil.Process.create_time)[:1]:
                            oldest.kill()
                            killed.append(oldest)

        async def run():
            limits = httpx.Limits(max_connections=80)
            async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
                streams.extend(asyncio.create_task(read(client, seed)) for seed in range(count))
                await kill_replicas()
                return await asyncio.gather(*streams)

        found = asyncio.run(run())
        assert server.metric("stu:requests_resumed_total") > 0
        assert server.metric("stu:replica_restarts_total") == num_kills
        assert found == undisturbed(code_model, code_tokenizer, range(count))
        eventually(lambda: ready(server) == 2)
        assert server.pages_used() == 0
        assert server.stop() == 0


def test_an_engine_that_ends_or_stops_is_replaced(model_directory, code_model, code_tokenizer):
    """Meanwhile /health fails, requests wait, and no counter falls."""

    def status(path):
        return server.get(path).status_code

    def complete():
        answer = server.post("/v1/completions", json=body(3, stream=False))
        (choice,) = answer.json()["choices"]
        return choice["text"], choice["logprobs"]["token_logprobs"]

    (expected,) = undisturbed(code_model, code_tokenizer, [3])
    with (
        serving(model_directory, "--batch-invariant", "--watchdog-seconds", 2) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        assert complete() == expected
        before = counters(server)
        assert any("are cached as spectral states of rank" in line for line in server.lines)
        (replica,) = server.replicas()
        replica.kill()
        eventually(lambda: status("/health") == 503, 5)
        assert status("/ready") == 503
        assert complete() == expected
        assert status("/health") == 200
        after = counters(server)
        assert {name: value for name, value in before.items() if after.get(name, -1) < value} == {}

        (replica,) = server.replicas()
        replica.send_signal(signal.SIGSTOP)
        answer = pool.submit(complete)
        eventually(lambda: status("/health") == 503, 10)
        assert answer.result(SECONDS) == expected
        assert not psutil.pid_exists(replica.pid)
        assert status("/health") == 200
        assert server.metric("stu:replica_restarts_total") == 2
        assert len([line for line in server.lines if "does not respond" in line]) == 1


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_clients_that_go_away_leave_nothing_behind(model_directory, count):
    with serving(model_directory, "--max-waiting", 2000) as server:
        rng = random.Random(0)

        async def read(client, seed, at_once):
            async with at_once:
                num_pieces = rng.choice([0, 1, 5, 30, NUM_TOKENS + 1])
                async with contextlib.aclosing(pieces(client, seed)) as stream:
                    async for _ in stream:
                        num_pieces -= 1
                        if num_pieces < 0:
                            return

        async def run():
            at_once = asyncio.Semaphore(100)
            async with httpx.AsyncClient(base_url=server.url, timeout=SECONDS) as client:
                await asyncio.gather(*[read(client, seed, at_once) for seed in range(count)])

        asyncio.run(run())
        eventually(lambda: server.metric("vllm:num_requests_running") == 0)
        eventually(lambda: server.pages_used() == 0)
        assert server.metric("vllm:num_requests_waiting") == 0
        assert server.metric("vllm:request_success_total") == count
        assert server.stop() == 0


def starting(model, *options, python=sys.executable, **environment):
    """A server process that has just begun."""
    command = [python, "-m", "serve.server.cli", str(model), "--port", "0", *options]
    env = {**os.environ, **environment}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)


@pytest.mark.parametrize(
    ("damaged", "cache_gib", "reason"),
    [
        ("config.json", "0.01", "config.json"),
        pytest.param(
            *("model.safetensors", "0.01", NO_REPLICA + ".*model.safetensors"),
            marks=pytest.mark.slow,
        ),
        (None, "1e-6", NO_REPLICA + ".*--cache-gib=9.993e-07 is too little"),
    ],
)
def test_a_server_that_cannot_start_says_why_and_exits_with_2(
    model_directory, tmp_path, patched, damaged, cache_gib, reason
):
    model = tmp_path / "model"
    shutil.copytree(model_directory, model)
    if damaged:
        (model / damaged).write_bytes(b"{}")
    options = "--cache-gib", cache_gib
    with starting(model, *options, python=forked.python(), **patched(NO_PAUSES)) as process:
        log = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 2
    assert re.search(reason, log.splitlines()[-1]), log
    assert "closed file" not in log


def test_a_server_stops_while_its_engine_loads(model_directory):
    with starting(model_directory, "--cache-gib", "0.01") as process:
        try:
            for line in process.stderr:
                if "Waiting for application startup" in line:
                    break
            parent = psutil.Process(process.pid)

            def engines():
                # Before its own program runs, the server waits for it to begin.
                return [child for child in parent.children() if ENGINE in child.cmdline()]

            eventually(engines)
            (replica,) = engines()
            replica.suspend()  # and so is never ready
            process.terminate()
            assert process.wait(SECONDS) == 0
            assert not replica.is_running()
        finally:
            process.kill()


def test_a_replica_goes_on_after_a_request_of_a_single_token(replica):
    """Its next report, when idle, names no request that has ended."""
    send, receive = replica
    send({"add": 7, "request": request_to_wire(make_request(PROMPT, 1))})
    assert [number for number, _ in receive("outputs")["scheduled"]] == [7]
    assert receive("stats")["scheduled"] == []


def test_a_faulty_request_does_not_end_its_replica(replica):
    send, receive = replica
    send({"add": 7, "request": {"of": "another version"}})
    failed = receive("failed")
    assert failed["failed"] == 7
    assert "Traceback" in failed["trace"]
    wrong = make_request([1, 100], 2, stop_at_eos=True, constraint=Constraint("regex", "("))
    send({"add": 8, "request": request_to_wire(wrong)})
    refused = receive("refused")
    assert refused["refused"] == 8
    send({"add": 9, "request": request_to_wire(make_request([1, 100], 2))})
    assert receive("outputs")["outputs"][0]["request_id"] == 9


def test_an_engine_whose_messages_cannot_be_read_is_replaced(monkeypatch, tmp_path, caplog):
    made = []

    class Unheard:
        streams, stats, settings, last_heard = {}, None, {}, float("inf")
        is_ready, is_killed = False, False

        def __init__(self, settings, num_threads):
            made.append(self)

        async def messages(self):
            if len(made) == 1:
                yield {"a message": "of another version"}
            await asyncio.Event().wait()

        def kill(self):
            self.is_killed = True

        async def ended(self):
            return "ended"

    monkeypatch.setattr(supervisor, "Replica", Unheard)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_SECONDS", 0)

    async def run():
        replicas = Replicas(ReplicasConfig(tmp_path))
        await replicas.start()
        while len(made) < 2:
            await asyncio.sleep(0.01)
        assert made[0].is_killed
        assert not made[1].is_killed
        await replicas.stop()

    asyncio.run(asyncio.wait_for(run(), SECONDS))
    assert "a message of replica 0 on cpu failed" in caplog.text
