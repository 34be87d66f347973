"""Keys, sizes, queues and time: what a server does not do, and how it stops."""

import json
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest

from serve.server.config import ServerConfig
from serve.server.listening import listening
from stu.common.errors import UserError
from tests.serve.server_process import SECONDS, events, eventually, serving

BODY = {"prompt": "x", "max_tokens": 60, "stop_at_eos": False}
SHORT = {**BODY, "max_tokens": 1}
KEYS = "first-key", "second-key"


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def guarded(model_directory, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    path.write_text("\n".join(KEYS) + "\n")
    options = "--api-keys", path, "--max-body-bytes", 4096, "--max-choices", 3
    with serving(model_directory, *options, "--cors-origins", "https://example.org") as server:
        yield server


def test_everything_but_health_needs_a_key(guarded):
    with guarded.client() as http:
        for headers in ({}, bearer("wrong"), bearer(KEYS[0] + "x"), {"authorization": KEYS[0]}):
            for path in ("/v1/models", "/metrics", "/version", "/openapi.json"):
                answer = http.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
            assert http.post("/v1/completions", json=BODY, headers=headers).status_code == 401
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 200
        for key in KEYS:
            assert http.get("/v1/models", headers=bearer(key)).status_code == 200
        answer = http.post("/v1/completions", json=BODY, headers=bearer(KEYS[1]))
        assert answer.status_code == 200


def test_keys_from_the_environment(model_directory):
    with serving(model_directory, STU_API_KEYS="a-key, b-key") as server, server.client() as http:
        assert http.get("/v1/models").status_code == 401
        assert http.get("/v1/models", headers=bearer("b-key")).status_code == 200


def test_bodies_that_are_too_large(guarded):
    with guarded.client(headers=bearer(KEYS[0])) as http:
        large = json.dumps({**BODY, "user": "x" * 5000}).encode()
        headers = {"content-type": "application/json"}
        answer = http.post("/v1/completions", content=large, headers=headers)
        assert answer.status_code == 413
        assert "4096 bytes" in answer.json()["error"]["message"]
        pieces = iter([large[:3000], large[3000:]])  # without a content-length
        answer = http.post("/v1/completions", content=pieces, headers=headers)
        assert answer.status_code == 413
        assert http.post("/v1/completions", json=BODY).status_code == 200


def test_headers_that_are_too_large(guarded):
    with guarded.client(headers=bearer(KEYS[0])) as http:
        answer = http.get("/version", headers={"x-large": "x" * 100_000})
        assert answer.status_code == 431
        assert http.get("/version").status_code == 200


def test_choices_and_origins(guarded):
    with guarded.client(headers=bearer(KEYS[0])) as http:
        answer = http.post("/v1/completions", json={**BODY, "n": 4})
        assert answer.status_code == 400
        assert "may ask for 3" in answer.json()["error"]["message"]
        for origin, allowed in (("https://example.org", True), ("https://other.org", False)):
            answer = http.get("/v1/models", headers={"origin": origin})
            assert ("access-control-allow-origin" in answer.headers) == allowed


def test_requests_beyond_the_queue_are_told_to_come_again(model_directory):
    options = "--max-running", 1, "--max-waiting", 3
    with serving(model_directory, *options) as server, server.client() as http:
        # Stopped, so that none of them begins meanwhile.
        (replica,) = server.replicas()
        replica.send_signal(signal.SIGSTOP)
        answers = []
        threads = [
            threading.Thread(
                target=lambda: answers.append(
                    httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=SECONDS)
                )
            )
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: server.metric("vllm:num_requests_waiting") == 3)
        refused = http.post("/v1/completions", json=BODY)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert http.get("/health").status_code == 200
        replica.send_signal(signal.SIGCONT)
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 3
        assert http.post("/v1/completions", json=BODY).status_code == 200


@pytest.mark.parametrize(
    ("open_files", "num_connections"),
    [(128, 300), pytest.param(1024, 2000, marks=pytest.mark.slow)],
)
def test_idle_connections_starve_neither_health_nor_engines(
    model_directory, open_files, num_connections
):
    """They took all descriptors, and each refused connection wrote a traceback."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    timeouts = "--header-timeout-seconds", 10, "--body-timeout-seconds", 10
    with ExitStack() as stack:
        server = stack.enter_context(serving(model_directory, *timeouts, open_files=open_files))
        half = "POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
        kinds = ["", half, f"{half}content-type: application/json\r\ncontent-length: 99\r\n\r\n{{"]
        opened = []
        for number in range(num_connections):
            address = "127.0.0.1", int(server.url.rsplit(":", 1)[1])
            connection = stack.enter_context(socket.create_connection(address, SECONDS))
            with suppress(ConnectionError):  # it made room for others already
                connection.sendall(kinds[number % 3].encode())
            opened.append(connection)
        assert httpx.get(f"{server.url}/health", timeout=SECONDS).status_code == 200
        (replica,) = server.replicas()
        replica.kill()
        answer = httpx.post(f"{server.url}/v1/completions", json=SHORT, timeout=2 * SECONDS)
        assert answer.status_code == 200
        assert server.metric("stu:replica_restarts_total") == 1
        for connection in opened:
            with suppress(ConnectionError):
                while connection.recv(1000):
                    pass
        assert len("".join(server.lines)) < 100_000


@contextmanager
def asking(server, path, body):
    """Send a request, and give the connection, of which nobody reads a byte."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        client.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        yield client


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_clients_that_read_nothing_are_cut_off(model_directory, patched, path):
    """When they are too far behind; what they did not read is not kept. What is behind because the
    server has yet to write it cuts off nobody."""
    environment = patched(
        "import serve.server.arrivals\nserve.server.arrivals.MOST_BYTES_BEHIND = 10_000\n"
    )
    with serving(model_directory, **environment) as server:
        body = {"n": 128, "max_tokens": 50, "stop_at_eos": False, "stream": True}
        body |= {"prompt": "x", "logprobs": 20}
        if "chat" in path:
            del body["prompt"]
            body |= {"messages": [{"role": "user", "content": "x"}]}
            body |= {"logprobs": True, "top_logprobs": 20, "max_tokens": 40}
        with (
            server.client() as http,
            http.stream("POST", path, json={**body, "max_tokens": 3}) as answer,
        ):
            assert len(events(answer)) == 3 * 128
        with asking(server, path, body):
            eventually(lambda: any("bytes of tokens behind" in line for line in server.lines))
            eventually(lambda: server.metric("vllm:num_requests_running") == 0)
            eventually(lambda: server.pages_used() == 0)
        assert httpx.get(f"{server.url}/health", timeout=SECONDS).status_code == 200


@pytest.mark.slow
def test_clients_that_read_nothing_leave_no_memory_behind(model_directory):
    """No more than clients leave that read the same answers, who get them whole; and what is kept
    for clients that read nothing is small meanwhile."""
    path = "/v1/completions"
    body = {"prompt": ["x"] * 4, "n": 128, "max_tokens": 60, "stop_at_eos": False}
    body |= {"logprobs": 20, "stream": True}
    options = "--max-choices", 512, "--max-waiting", 1024, "--max-running", 256
    with serving(model_directory, *options) as server:

        def read(max_tokens):
            with (
                server.client() as http,
                http.stream("POST", path, json={**body, "max_tokens": max_tokens}) as answer,
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
        with asking(server, path, body), asking(server, path, body):
            eventually(lambda: "".join(server.lines).count("bytes of tokens behind") == 2)
            eventually(lambda: server.metric("vllm:num_requests_running") == 0)
            allowed = server_bytes + 30e6, engine_bytes + 30e6
            eventually(lambda: all(map(float.__gt__, allowed, server.resident_bytes())), 30)
        assert server.peak_bytes() - before < 60e6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("size", [10_000, 5_000_000, 20_000_000])
def test_node_sees_that_its_body_is_too_large(guarded, size):
    program = """
        const [url, key, size] = process.argv.slice(1);
        const body = JSON.stringify({prompt: "x".repeat(Number(size))});
        const headers = {"content-type": "application/json", authorization: `Bearer ${key}`};
        const answer = await fetch(`${url}/v1/completions`, {method: "POST", body, headers});
        console.log(answer.status, (await answer.json()).error.message);
    """
    command = ["node", "--input-type=module", "-e", program, guarded.url, KEYS[0], str(size)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    assert found.stdout.startswith("413 the body has more than"), found.stdout


def test_a_request_that_takes_too_long_ends(model_directory):
    with serving(model_directory, "--request-timeout-seconds", 3) as server:
        (replica,) = server.replicas()
        with server.client() as http:
            replica.send_signal(signal.SIGSTOP)
            answer = http.post("/v1/completions", json=BODY)
            assert answer.status_code == 504
            assert "3 seconds" in answer.json()["error"]["message"]
            replica.send_signal(signal.SIGCONT)
            assert http.post("/v1/completions", json=SHORT).status_code == 200
        eventually(lambda: server.pages_used() == 0)


def test_a_server_that_is_asked_to_stop_ends_what_runs(model_directory):
    with serving(model_directory, "--drain-seconds", 30) as server:
        (replica,) = server.replicas()
        with (
            server.client() as http,
            http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            text = [line for line in lines if line]
            assert text[-1] == "data: [DONE]"
        assert server.process.wait(SECONDS) == 0
        assert not replica.is_running()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def test_what_does_not_end_while_the_server_drains_is_told_so(model_directory):
    with serving(model_directory, "--drain-seconds", 0.5) as server:
        (replica,) = server.replicas()
        replica.send_signal(signal.SIGSTOP)  # nothing ends
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=SECONDS)
            )
        )
        thread.start()
        eventually(lambda: server.metric("vllm:num_requests_waiting") == 1)
        server.process.send_signal(signal.SIGTERM)
        thread.join()
        assert answers[0].status_code == 503
        assert answers[0].json()["error"]["code"] == "unavailable"
        assert server.process.wait(SECONDS) == 0


def test_a_browser_asks_without_a_key_whether_it_may_send_one(guarded):
    with guarded.client() as http:
        headers = {
            "origin": "https://example.org",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        answer = http.options("/v1/completions", headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        refused = http.get("/v1/models", headers={"origin": "https://example.org"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://example.org"


def test_a_server_that_is_asked_twice_stops_at_once(model_directory):
    with serving(model_directory) as server:
        (replica,) = server.replicas()
        replica.send_signal(signal.SIGSTOP)
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as http:
            body = json.dumps(BODY).encode()
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            http.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            eventually(lambda: server.metric("vllm:num_requests_waiting") == 1)
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: any("Shutting down" in line for line in server.lines))
            assert server.process.poll() is None
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(SECONDS) == 128 + signal.SIGTERM
            assert time.monotonic() - began < 20
        eventually(lambda: not replica.is_running() or replica.status() == "zombie")


def test_tls(model_directory, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with serving(model_directory, "--tls-certificate", certificate, "--tls-key", key) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=certificate)
        assert httpx.get(f"{server.url}/health", verify=context).status_code == 200
    encrypted = tmp_path / "encrypted.pem"
    command = ["openssl", "rsa", "-aes256", "-passout", "pass:secret", "-in", key]
    subprocess.run([*command, "-out", encrypted], check=True, capture_output=True)
    config = ServerConfig(model_directory, port=0, tls_certificate=certificate, tls_key=encrypted)
    # Refused, and no question on the terminal.
    with pytest.raises(OSError, match="without passphrase"), listening(config):
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


@pytest.mark.parametrize("text", ["", " \n\n", "a b\n", "größe\n", "a,b\n"])
def test_key_files_that_are_not_allowed(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(UserError, match=r"has no key|beyond printable ASCII"):
        ServerConfig(tmp_path, api_keys=path).keys()


@pytest.mark.parametrize("value", ["", " ", ",", " , ,"])
def test_a_variable_without_keys_does_not_open_the_server(tmp_path, monkeypatch, value):
    monkeypatch.delenv("STU_API_KEYS", raising=False)
    config = ServerConfig(tmp_path)
    assert config.keys() == []
    monkeypatch.setenv("STU_API_KEYS", value)
    with pytest.raises(UserError, match="STU_API_KEYS is set and has no key"):
        config.keys()


def test_keys_in_two_places_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text("a-key\n")
    monkeypatch.setenv("STU_API_KEYS", "b-key")
    with pytest.raises(UserError, match="are both set"):
        ServerConfig(tmp_path, api_keys=path).keys()


def test_prompts_are_in_no_log(model_directory):
    with serving(model_directory) as server, server.client() as http:
        body = {**BODY, "prompt": "a secret", "max_tokens": 9, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            events(answer)
        assert server.stop() == 0
        assert "secret" not in "".join(server.lines)
        assert all(json.loads(line)["level"] for line in server.lines)


def test_each_answer_has_a_line_in_the_log(model_directory):
    with serving(model_directory, "--log-prompts") as server, server.client() as http:
        answers = [http.post("/v1/completions", json={**BODY, "max_tokens": 5, "n": 2})]
        with http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer:
            texts = [its["choices"][0]["text"] for its in events(answer)]
        answers.append(answer)
        assert server.stop() == 0
    lines = [json.loads(line) for line in server.lines]
    first, second = [line for line in lines if line["message"] == "request ended"]
    assert [first["request_id"], second["request_id"]] == [
        its.headers["x-request-id"] for its in answers
    ]
    assert answers[0].json()["id"] == f"cmpl-{first['request_id']}"
    assert first["completion_tokens"] == 10
    assert first["completions"] == [its["text"] for its in answers[0].json()["choices"]]
    assert second["finish_reasons"] == ["length"]
    assert second["prompts"] == ["x"]
    assert second["completions"] == ["".join(texts)]
    assert 0 < second["seconds"] < SECONDS
