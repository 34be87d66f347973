"""Engines that are killed or stopped, and readers that go away: no stream is lost or changed."""

import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import asdict

import httpx
import psutil
import pytest

from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.sampling_params import SamplingParams
from serve.server.replicas import supervisor
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.process import Replica
from serve.server.replicas.supervisor import ReplicasConfig
from serve.server.replicas.wire import Unpacker, pack, request_to_wire
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.model_dir import save_model
from tests import forked
from tests.serve.requests import make_request
from tests.serve.server_process import SECONDS, events, eventually, serving

PROMPT = [1, 100, 101, 102]
NUM_TOKENS = 55


def body(seed, **more):
    settings = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 1, "seed": seed}
    return {**settings, "stop_at_eos": False, "stream": True, "logprobs": 1, **more}


def undisturbed(model, tokenizer, seeds):
    """Text and log probabilities of each seed's request."""
    config = EngineConfig(cache_gib=0.01, batch_invariant=True)
    engine = Engine(model, tokenizer, config)
    found = {}
    for seed in seeds:
        sampling = SamplingParams(temperature=1, seed=seed, logprobs=1)
        found[engine.add(make_request(PROMPT, NUM_TOKENS, sampling))] = ["", []]
    while engine.has_work:
        for output in engine.step():
            found[output.request_id][0] += output.text
            found[output.request_id][1] += [its.logprob for its in output.logprobs]
    return list(found.values())


async def stream(client, seed):
    """A request's text and log probabilities, as they come."""
    text, logprobs = "", []
    async with client.stream("POST", "/v1/completions", json=body(seed)) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return [text, logprobs]
            if line:
                piece = json.loads(line.removeprefix("data: "))
                assert "error" not in piece, piece
                (choice,) = piece["choices"]
                text += choice["text"]
                logprobs += choice["logprobs"]["token_logprobs"]
    raise AssertionError("the stream ended without [DONE]")


def counters(server):
    """All counters' values, by name and labels, and each name's sum."""
    text = httpx.get(f"{server.url}/metrics", timeout=SECONDS).text
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


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_streams_go_on_while_engines_are_killed(model_directory, code_model, code_tokenizer, count):
    """To the last bit of every log probability."""
    seeds = range(count)
    options = "--replicas", 2, "--batch-invariant", "--max-waiting", 600
    with serving(model_directory, *options) as server:
        eventually(lambda: ready(server) == 2)
        rng, num_kills = random.Random(0), 0

        async def all_streams():
            limits = httpx.Limits(max_connections=80)
            async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
                return await asyncio.gather(*[stream(client, seed) for seed in seeds])

        async def kill_some(streams):
            nonlocal num_kills
            while not streams.done():
                await asyncio.sleep(rng.uniform(0.2, 2))
                if ready(server) == 2 or (ready(server) and rng.random() < 0.3):
                    rng.choice(server.replicas()).send_signal(signal.SIGKILL)
                    num_kills += 1

        async def run():
            streams = asyncio.ensure_future(all_streams())
            await asyncio.gather(streams, kill_some(streams))
            return streams.result()

        found = asyncio.run(run())
        assert num_kills >= 3
        assert server.metric("stu:requests_resumed_total") > 0
        assert server.metric("stu:replica_restarts_total") >= 3
        expected = undisturbed(code_model, code_tokenizer, seeds)
        wrong = [seed for seed in seeds if found[seed] != expected[seed]]
        assert wrong == []
        eventually(lambda: ready(server) == 2)
        assert server.pages_used() == 0
        assert server.stop() == 0


def test_an_engine_that_stops_is_replaced(model_directory, code_model, code_tokenizer):
    """Within the watchdog's time, and /health says so until there is another."""
    with serving(model_directory, "--batch-invariant", "--watchdog-seconds", 2) as server:
        (replica,) = server.replicas()
        replica.send_signal(signal.SIGSTOP)
        with (
            server.client() as client,
            client.stream("POST", "/v1/completions", json=body(3), timeout=SECONDS) as answer,
        ):
            pieces = events(answer)
        eventually(lambda: not psutil.pid_exists(replica.pid))
        assert server.metric("stu:replica_restarts_total") == 1
        text = "".join(its["choices"][0]["text"] for its in pieces)
        assert text == undisturbed(code_model, code_tokenizer, [3])[0][0]
        assert len([line for line in server.lines if "does not respond" in line]) == 1
        (other,) = server.replicas()
        other.send_signal(signal.SIGSTOP)
        eventually(lambda: not httpx.get(f"{server.url}/health").is_success, 10)
        eventually(lambda: httpx.get(f"{server.url}/health").is_success)


def test_health_tells_at_once_that_the_last_engine_is_gone(model_directory):
    with serving(model_directory) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        httpx.post(f"{server.url}/v1/completions", json=body(1, stream=False), timeout=SECONDS)
        before = counters(server)
        assert any(name.startswith("stu:flushes_total") for name in before)
        (replica,) = server.replicas()
        replica.kill()
        eventually(lambda: httpx.get(f"{server.url}/health").status_code == 503, 5)
        assert httpx.get(f"{server.url}/ready").status_code == 503
        # A request waits for the next engine.
        answer = httpx.post(
            f"{server.url}/v1/completions", json=body(1, stream=False), timeout=SECONDS
        )
        assert answer.status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == 200
        # No counter falls or is lost with the engine that counted.
        after = counters(server)
        assert {name: value for name, value in before.items() if after.get(name, -1) < value} == {}
        assert after["stu:flushes_total"] > before["stu:flushes_total"]


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_readers_some_of_whom_go_away(model_directory, count):
    with serving(model_directory, "--max-waiting", 2000) as server:
        rng = random.Random(0)

        async def read(client, seed, at_once):
            async with at_once:
                num_lines = rng.choice([0, 1, 5, 30, 10**9])
                async with client.stream("POST", "/v1/completions", json=body(seed)) as answer:
                    async for line in answer.aiter_lines():
                        num_lines -= 1
                        if num_lines < 0 or line == "data: [DONE]":
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


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_a_model_that_cannot_be_loaded_is_named(model_directory, tmp_path, damage):
    for path in model_directory.iterdir():
        content = b"{}" if path.name == damage else path.read_bytes()
        (tmp_path / path.name).write_bytes(content)
    with pytest.raises(AssertionError, match=damage), serving(tmp_path):
        pass


def starting(model, *options, python=sys.executable):
    """A server that has just begun, its log to be read."""
    command = [python, "-m", "serve.server.cli", str(model), "--port", "0", *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_server_that_cannot_start_says_why_and_ends_with_2(model_directory):
    with starting(model_directory, "--cache-gib", "1e-6", python=forked.python()) as process:
        log = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 2
    assert "no replica could be started: replica 0 on cpu ended with code 2" in log
    assert "is too little" in log
    assert "closed file" not in log


def test_a_server_stops_while_its_engine_loads(model_directory):
    with starting(model_directory, "--cache-gib", "0.01") as process:
        try:
            for line in process.stderr:
                if "Waiting for application startup" in line:
                    break
            parent = psutil.Process(process.pid)

            def engine():
                # Before its own program runs, the server waits for it to begin.
                return [
                    child
                    for child in parent.children()
                    if "serve.server.replicas.process" in child.cmdline()
                ]

            eventually(engine)
            (replica,) = engine()
            replica.suspend()  # and so is never ready
            process.terminate()
            assert process.wait(SECONDS) == 0
            assert not replica.is_running()
        finally:
            process.kill()


def test_what_an_engine_warns_of_is_logged(tmp_path, code_tokenizer):
    config = ModelConfig(
        vocab_size=code_tokenizer.vocab_size, width=16, num_layers=2, layout="hyena", num_heads=2
    )
    save_model(tmp_path / "model", FlashSTU(config), code_tokenizer, {"max_new_tokens": 9})
    with serving(tmp_path / "model") as server:
        assert any("replica 0 on cpu: tiles flush through FFTs" in line for line in server.lines)


def test_an_engine_goes_on_after_a_request_of_a_single_token(model_directory):
    """What it reports when idle names no request that has ended."""
    ours, theirs = socket.socketpair()
    ours.settimeout(SECONDS)
    unpacker = Unpacker()

    def reports():
        while True:
            yield from unpacker.feed(ours.recv(2**16))

    def run():
        with contextlib.suppress(SystemExit, ConnectionError), theirs:
            Replica(theirs).run()

    thread = threading.Thread(target=run)
    thread.start()
    with ours:
        settings = {"model": str(model_directory), "device": "cpu", "dtype": "float32"}
        ours.sendall(pack({**settings, "engine": asdict(EngineConfig(cache_gib=0.01))}))
        messages = reports()
        assert "ready" in next(messages)
        ours.sendall(pack({"add": 7, "request": request_to_wire(make_request(PROMPT, 1))}))
        first = next(report for report in messages if report["outputs"])
        assert [number for number, _ in first["scheduled"]] == [7]
        assert next(messages)["scheduled"] == []
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_an_engine_that_cannot_be_heard_is_replaced(monkeypatch, tmp_path, caplog):
    """Messages of engines were no longer read, and only /health showed it."""
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
