"""Limits of connections, queues and time, and how a server stops."""

import json
import resource
import signal
import socket
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest

from serve.server.config import ServerConfig
from serve.server.listening import listening
from stu.common.errors import UserError
from tests.serve.server_process import SECONDS, events, eventually, serving

PATH = "/v1/completions"
BODY = {"prompt": "x", "max_tokens": 60, "stop_at_eos": False}
SHORT = {**BODY, "max_tokens": 1}


def test_requests_beyond_the_queue_are_refused_until_later(model_directory):
    options = "--max-running", 1, "--max-waiting", 3
    with serving(model_directory, *options) as server, server.client() as http:
        # Stopped, so that no request begins meanwhile.
        (replica,) = server.replicas()
        replica.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor() as pool:
            answers = [pool.submit(http.post, PATH, json=BODY) for _ in range(3)]
            eventually(lambda: server.metric("vllm:num_requests_waiting") == 3)
            refused = http.post(PATH, json=BODY)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert http.get("/health").status_code == 200
            replica.send_signal(signal.SIGCONT)
            assert [answer.result().status_code for answer in answers] == [200] * 3
        assert http.post(PATH, json=BODY).status_code == 200


@pytest.mark.parametrize(
    ("open_files", "num_connections"),
    [(100, 150), pytest.param(1024, 2000, marks=pytest.mark.slow)],
)
def test_idle_connections_starve_neither_health_nor_replicas(
    model_directory, open_files, num_connections
):
    """They leave file descriptors for a new replica, and end when their deadline is over."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    timeouts = "--header-timeout-seconds", 3, "--body-timeout-seconds", 3
    with ExitStack() as stack:
        server = stack.enter_context(serving(model_directory, *timeouts, open_files=open_files))
        half = "POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
        kinds = ["", half, f"{half}content-type: application/json\r\ncontent-length: 99\r\n\r\n{{"]
        opened = []
        for number in range(num_connections):
            connection = stack.enter_context(socket.create_connection(server.address, SECONDS))
            with suppress(ConnectionError):  # it made room for others already
                connection.sendall(kinds[number % 3].encode())
            opened.append(connection)
        assert server.get("/health").status_code == 200
        (replica,) = server.replicas()
        replica.kill()
        answer = server.post(PATH, json=SHORT, timeout=2 * SECONDS)
        assert answer.status_code == 200
        assert server.metric("stu:replica_restarts_total") == 1
        for connection in opened:
            with suppress(ConnectionError):
                while connection.recv(1000):
                    pass
        assert len("".join(server.lines)) < 100_000
        assert "Too many open files" not in "".join(server.lines)


@contextmanager
def asking(server, path, body):
    """Send a request on a connection from which nothing is read."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(server.address)
        client.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        yield


def test_clients_too_far_behind_are_cut_off(model_directory, patched):
    """Nothing is kept for them. A client is not cut off for what the server has yet to write."""
    environment = patched(
        "import serve.server.arrivals\nserve.server.arrivals.MOST_BYTES_BEHIND = 10_000\n"
    )
    body = {"n": 128, "stop_at_eos": False, "stream": True}
    text = {**body, "prompt": "x", "logprobs": 20, "max_tokens": 50}
    chat = {**body, "messages": [{"role": "user", "content": "x"}]}
    chat |= {"logprobs": True, "top_logprobs": 20, "max_tokens": 40}
    with serving(model_directory, **environment) as server, server.client() as http:

        def is_cut_off():
            return any("bytes of tokens behind" in line for line in server.lines[num_lines:])

        for path, body in ((PATH, text), ("/v1/chat/completions", chat)):
            num_lines = len(server.lines)
            with http.stream("POST", path, json={**body, "max_tokens": 3}) as answer:
                assert len(events(answer)) == 3 * 128
            with asking(server, path, body):
                eventually(is_cut_off)
                eventually(lambda: server.metric("vllm:num_requests_running") == 0)
                eventually(lambda: server.pages_used() == 0)
            assert http.get("/health").status_code == 200


@pytest.mark.slow
def test_clients_that_read_nothing_leave_no_memory_behind(model_directory):
    """No more than clients that read the same answers whole, and little meanwhile."""
    body = {"prompt": ["x"] * 4, "n": 128, "max_tokens": 60, "stop_at_eos": False}
    body |= {"logprobs": 20, "stream": True}
    options = "--max-choices", 512, "--max-waiting", 1024, "--max-running", 256
    with serving(model_directory, *options) as server:

        def read(max_tokens):
            with (
                server.client() as http,
                http.stream("POST", PATH, json={**body, "max_tokens": max_tokens}) as answer,
            ):
                found.append(b"".join(answer.iter_raw())[-14:])

        before = None
        for max_tokens in (2, 60):
            found = []
            threads = [threading.Thread(target=read, args=[max_tokens]) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert found == [b"data: [DONE]\n\n"] * 2
            before = before or server.peak_bytes()
        server_bytes, engine_bytes = server.resident_bytes()
        with asking(server, PATH, body), asking(server, PATH, body):
            eventually(lambda: "".join(server.lines).count("bytes of tokens behind") == 2)
            eventually(lambda: server.metric("vllm:num_requests_running") == 0)
            allowed = server_bytes + 30e6, engine_bytes + 30e6
            eventually(lambda: all(map(float.__gt__, allowed, server.resident_bytes())), 30)
        assert server.peak_bytes() - before < 60e6


def test_request_that_takes_too_long_ends(model_directory):
    """After the time limit of requests, or when the time to drain is over."""
    options = "--request-timeout-seconds", 2, "--drain-seconds", 0.5
    with serving(model_directory, *options) as server, server.client() as http:
        (replica,) = server.replicas()
        replica.send_signal(signal.SIGSTOP)
        answer = http.post(PATH, json=BODY)
        assert answer.status_code == 504
        assert "2 seconds" in answer.json()["error"]["message"]
        replica.send_signal(signal.SIGCONT)
        assert http.post(PATH, json=SHORT).status_code == 200
        eventually(lambda: server.pages_used() == 0)
        replica.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(http.post, PATH, json=BODY)
            eventually(lambda: server.metric("vllm:num_requests_waiting") == 1)
            server.process.send_signal(signal.SIGTERM)
            assert answer.result().status_code == 503
        assert answer.result().json()["error"]["code"] == "unavailable"
        assert server.process.wait(SECONDS) == 0


def test_server_that_stops_ends_what_runs_and_logs_it(model_directory):
    options = "--drain-seconds", 30, "--log-prompts"
    with serving(model_directory, *options) as server, server.client() as http:
        (replica,) = server.replicas()
        whole = http.post(PATH, json={**BODY, "max_tokens": 5, "n": 2})
        with http.stream("POST", PATH, json={**BODY, "stream": True}) as streamed:
            chunks = streamed.iter_lines()
            lines = [next(chunks)]
            server.process.send_signal(signal.SIGTERM)
            lines += filter(None, chunks)
        assert server.process.wait(SECONDS) == 0
        assert not replica.is_running()
        with pytest.raises(httpx.ConnectError):
            http.get("/health")
    assert lines.pop() == "data: [DONE]"
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines]
    logged = [json.loads(line) for line in server.lines]
    first, second = [line for line in logged if line["message"] == "request ended"]
    assert first["request_id"] == whole.headers["x-request-id"]
    assert second["request_id"] == streamed.headers["x-request-id"]
    assert whole.json()["id"] == f"cmpl-{first['request_id']}"
    assert first["completion_tokens"] == 10
    assert first["completions"] == [choice["text"] for choice in whole.json()["choices"]]
    assert second["finish_reasons"] == ["length"]
    assert second["prompts"] == ["x"]
    assert second["completions"] == ["".join(texts)]
    assert 0 < second["seconds"] < SECONDS


def test_server_that_is_stopped_twice_ends_at_once(model_directory):
    with serving(model_directory) as server:
        (replica,) = server.replicas()
        replica.send_signal(signal.SIGSTOP)
        with asking(server, PATH, BODY):
            eventually(lambda: server.metric("vllm:num_requests_waiting") == 1)
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: any("Shutting down" in line for line in server.lines))
            assert server.process.poll() is None
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(SECONDS) == 128 + signal.SIGTERM
            assert time.monotonic() - began < 20
        eventually(lambda: not replica.is_running() or replica.status() == "zombie")


def test_tls(model_directory, tmp_path, certificate):
    chain, key = certificate
    with serving(model_directory, "--tls-certificate", chain, "--tls-key", key) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=chain)
        assert httpx.get(f"{server.url}/health", verify=context).status_code == 200
    encrypted = tmp_path / "encrypted.pem"
    command = ["openssl", "rsa", "-aes256", "-passout", "pass:secret", "-in", key]
    subprocess.run([*command, "-out", encrypted], check=True, capture_output=True)
    config = ServerConfig(model_directory, port=0, tls_certificate=chain, tls_key=encrypted)
    # Refused, without a question on the terminal.
    with pytest.raises(OSError, match="without a passphrase"), listening(config):
        pass


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("replicas", 0, "replicas=0 is not allowed: it must be a whole number >= 1"),
        ("port", 70000, "port=70000 is not allowed: it must be from 0 to 65535"),
        ("max_body_bytes", 5, "max_body_bytes=5 is not allowed"),
        ("watchdog_seconds", 0, "watchdog_seconds=0 is not allowed"),
        ("drain_seconds", float("nan"), "drain_seconds=NaN is not allowed"),
        ("tls_key", "x", "--tls-certificate and --tls-key need each other"),
        ("api_keys", "no/such", "--api-keys no/such: no such file"),
        ("api_keys", "sk-123", "^--api-keys: no such file; give the path of a file"),
    ],
)
def test_settings_that_are_not_allowed(tmp_path, name, value, message):
    value = tmp_path.__class__(value) if isinstance(value, str) else value
    with pytest.raises(UserError, match=message):
        ServerConfig(tmp_path, **{name: value})
