"""What operators rely on: keys, IDs, the log, probes, and where a server listens."""

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest

from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.stats import Stats
from serve.server.config import ServerConfig
from serve.server.listening import is_reached_from_outside, listening, url_of
from serve.server.operating.logs import JsonFormatter
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.dispatcher import NO_REPLICA
from serve.server.replicas.stream import Stream, Unavailable
from serve.server.replicas.supervisor import ReplicasConfig
from serve.server.streams import event
from tests import forked
from tests.serve.requests import make_request
from tests.serve.server_process import SECONDS, eventually, serving

KEYS = "first-key", "second-key"
SHORT = {"prompt": "x", "max_tokens": 1, "stop_at_eos": False}
SECRET = "xyzzy"
WRONG_SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": SECRET}}}
ORIGIN = "https://example.org"


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def server(model_directory, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    path.write_text("\n".join(KEYS) + "\n")
    options = "--api-keys", path, "--max-body-bytes", 4096, "--max-choices", 3
    with serving(model_directory, *options, "--cors-origins", ORIGIN) as server:
        yield server
        assert not [line for line in server.lines if any(key in line for key in KEYS)]
        assert all(json.loads(line)["level"] for line in server.lines)


@pytest.fixture(scope="module")
def http(server):
    with server.client(headers=bearer(KEYS[1])) as http:
        yield http


def num_refused(server, status):
    """The counter of refusals with a status."""
    text = server.get("/metrics", headers=bearer(KEYS[0])).text
    found = re.search(rf'^stu:requests_refused_total.*status="{status}".* (\S+)$', text, re.M)
    return float(found[1]) if found else 0.0


def logged(server, **fields):
    """The only line of the log with these fields, once it is there."""

    def found():
        lines = [json.loads(line) for line in server.lines]
        return [line for line in lines if fields.items() <= line.items()]

    eventually(found)
    (line,) = found()
    return line


def test_only_probes_need_no_key(server):
    with server.client() as http:
        for headers in ({}, bearer("wrong"), bearer(KEYS[0] + "x"), {"authorization": KEYS[0]}):
            answer = http.post("/v1/completions", json=SHORT, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert http.get("/health", headers=headers).status_code == 200
            assert http.get("/ready", headers=headers).status_code == 200
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json"):
            assert http.get(path).status_code == 401
        for key in KEYS:
            assert http.get("/v1/models", headers=bearer(key)).status_code == 200


@pytest.mark.parametrize(
    ("status", "method", "path", "settings", "reason"),
    [
        (401, "GET", "/v1/models", {"headers": bearer("wrong")}, "the API key is missing or wrong"),
        (404, "GET", "/v1/nothing", {}, "Not Found"),
        (405, "GET", "/v1/completions", {}, "Method Not Allowed"),
        (400, "POST", "/v1/completions", {"json": {**SHORT, "n": 0}}, "n=0 is not allowed"),
        (400, "POST", "/v1/completions", {"json": {**SHORT, "n": 4}}, "may ask for 3"),
        (400, "POST", "/v1/completions", {"json": {}}, 'field "prompt" is missing'),
        (400, "POST", "/v1/completions", {"json": {**SHORT, "max_tokens": 99}}, "max_seq_len=64"),
        (400, "POST", "/v1/chat/completions", {"content": b"{"}, "must be a JSON object"),
        (404, "POST", "/v1/completions", {"json": {**SHORT, "model": "y"}}, "the only model here"),
        (413, "POST", "/v1/completions", {"content": b"x" * 5000}, "4096 bytes"),
        # Without a content-length.
        (413, "POST", "/v1/completions", {"content": [b'{"prompt": "', b"x" * 5000]}, "4096 bytes"),
        (431, "GET", "/version", {"headers": {"x-large": "x" * 20_000}}, "the headers have more"),
    ],
)
def test_refusals_have_an_id_and_a_line_in_the_log(
    server, http, status, method, path, settings, reason
):
    own_id = f"gateway/{uuid.uuid4()}"
    headers = {"X-Request-Id": own_id, **settings.get("headers", {})}
    before = num_refused(server, status)
    answer = http.request(method, path, **{**settings, "headers": headers})
    assert answer.status_code == status
    assert answer.headers.get_list("x-request-id") == [own_id]
    line = logged(server, request_id=own_id)
    assert num_refused(server, status) == before + 1
    error = answer.json()["error"]
    assert reason in error["message"]
    assert reason.split("=")[0] in line["message"]
    assert (line["status"], line["method"], line["path"]) == (status, method, path)
    assert (line["param"], line["code"]) == (error["param"], error["code"])
    assert line["client"] == ("127.0.0.1" if status == 401 else "key 2")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("size", [10_000, 5_000_000, 20_000_000])
def test_node_sees_that_its_body_is_too_large(server, size):
    program = """
        const [url, key, size] = process.argv.slice(1);
        const body = JSON.stringify({prompt: "x".repeat(Number(size))});
        const headers = {"content-type": "application/json", authorization: `Bearer ${key}`};
        const answer = await fetch(`${url}/v1/completions`, {method: "POST", body, headers});
        console.log(answer.status, (await answer.json()).error.message);
    """
    command = ["node", "--input-type=module", "-e", program, server.url, KEYS[0], str(size)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    assert found.stdout.startswith("413 the body has more than"), found.stdout


def test_browser_asks_without_a_key_whether_it_may_send_one(server):
    with server.client(headers={"origin": ORIGIN}) as http:
        headers = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        answer = http.options("/v1/completions", headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        refused = http.get("/v1/models")
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == ORIGIN
        other = http.get("/v1/models", headers={"origin": "https://other.org"})
        assert "access-control-allow-origin" not in other.headers


def test_request_ids_of_clients_are_used_if_they_are_short_and_printable(server, http):
    for own_id in ("a", "x" * 128, "{7f-3e}/1"):
        answer = http.post("/v1/completions", json=SHORT, headers={"x-request-id": own_id})
        assert answer.headers["x-request-id"] == own_id
        assert answer.json()["id"] == f"cmpl-{own_id}"
        assert logged(server, request_id=own_id)["message"] == "request ended"
    new_ids = set()
    for other in ("", "x" * 129, "a b", "größe".encode(), None):
        headers = {} if other is None else {"x-request-id": other}
        new_ids.add(http.get("/health", headers=headers).headers["x-request-id"])
    assert len(new_ids) == 5
    assert all(len(new_id) == 24 and new_id.isalnum() for new_id in new_ids)


def test_no_text_of_a_request_is_logged(server, http):
    bodies = [
        {"prompt": [SECRET, {"a": SECRET}]},
        {"prompt": f"{SECRET} " * 40},
        {"prompt": f"{SECRET}\ud800"},
        {"prompt": [[1, SECRET]]},
        {"stop": [SECRET] * 140},
        {"stop": [SECRET * 300]},
        {"suffix": SECRET},
        {"metadata": SECRET},
        {"tools": [{"name": SECRET}]},
        {"logit_bias": {SECRET: 1}},
        {"response_format": {"type": SECRET}},
        {"response_format": {"type": "regex", "regex": f"{SECRET}("}},
        {"response_format": {"type": "json_schema", "json_schema": {SECRET: 1}}},
        {"response_format": WRONG_SCHEMA},
    ]
    cases = [("/v1/completions", {**SHORT, **body}) for body in bodies]
    wrong = {"name": "x", "parameters": {"type": "object", "properties": {SECRET: {"type": "a"}}}}
    cases += [
        ("/v1/responses", {"input": [{"type": SECRET}]}),
        ("/v1/responses", {"input": "x", "include": [SECRET]}),
        ("/v1/responses", {"input": "x", "previous_response_id": SECRET}),
        ("/v1/responses", {"input": "x", "tools": [{"type": SECRET}]}),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", **wrong}]}),
        ("/v1/responses", {"input": "x", "tool_choice": SECRET}),
        ("/v1/responses", {"input": [{"type": "function_call_output", "call_id": SECRET}]}),
    ]
    before = len(server.lines)
    for number, (path, body) in enumerate(cases):
        headers = {"x-request-id": f"secret-{number}", "content-type": "application/json"}
        answer = http.post(path, content=json.dumps(body), headers=headers)
        assert answer.status_code == 400, answer.text
        logged(server, request_id=f"secret-{number}", status=400)
    headers = {"x-request-id": "secret-stream"}
    http.post("/v1/completions", json={**SHORT, "prompt": SECRET, "stream": True}, headers=headers)
    logged(server, request_id="secret-stream", message="request ended")
    assert not [line for line in server.lines[before:] if SECRET in line]


def test_probes_take_head(http):
    for path in ("/health", "/ready", "/version", "/metrics", "/v1/models", "/tokenizer_info"):
        answer, head = http.get(path), http.head(path)
        assert (answer.status_code, head.status_code) == (200, 200)
        assert head.content == b""
        assert head.headers["content-type"] == answer.headers["content-type"]
    assert http.head("/v1/completions").status_code == 405
    assert http.get("/v1/completions").headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/v1/completions/", "/v1/models/", "/health/"])
def test_no_path_redirects(http, path):
    for method in ("GET", "POST"):
        answer = http.request(method, path, json=SHORT, headers={"host": "evil.example"})
        assert answer.status_code in (404, 405)
        assert "location" not in answer.headers
        assert "evil.example" not in answer.headers.values()


def refused_start(model, *options):
    """Exit code and log of a server that cannot start."""
    done = forked.run(forked.python(), "-m", "serve.server.cli", model, *options)
    return done.returncode, done.stderr


def test_port_in_use_is_noticed_before_the_model_is_loaded(tmp_path):
    """There is no model, which is not noticed."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, log = refused_start(tmp_path, "--port", port)
    assert (code, log.count("\n")) == (2, 1)
    assert f"--host 127.0.0.1 --port {port}: the server cannot listen there (Address" in log


def test_listening_to_other_machines_without_keys_logs_a_warning(tmp_path):
    code, log = refused_start(tmp_path, "--host", "0.0.0.0", "--port", 0)
    assert code == 2  # there is no model
    (line,) = [json.loads(line) for line in log.splitlines() if "without API keys" in line]
    assert line["level"] == "warning"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "256.0.0.1"}, "--host 256.0.0.1 --port 0: the server cannot listen there"),
        ({"host": "192.0.2.1"}, "(Cannot assign requested address)"),
        ({"uds": "file"}, "file: the server cannot listen there (there is a file that is not a so"),
        ({"tls_key": "file", "tls_certificate": "file"}, "file, --tls-key file: cannot be used"),
    ],
)
def test_addresses_and_files_that_cannot_be_used_are_named(
    tmp_path, monkeypatch, settings, message
):
    monkeypatch.chdir(tmp_path)
    file = Path("file")
    file.write_text("not to be overwritten")
    settings = {name: file if value == "file" else value for name, value in settings.items()}
    config = ServerConfig(tmp_path, port=0, **settings)
    with pytest.raises(OSError, match=re.escape(message)), listening(config):
        pass
    assert file.read_text() == "not to be overwritten"


def test_all_addresses_of_a_host_have_one_port(tmp_path):
    with listening(ServerConfig(tmp_path, host="localhost", port=0)) as sockets:
        assert len({listener.getsockname()[1] for listener in sockets}) == 1
        assert not any(map(is_reached_from_outside, sockets))
    with listening(ServerConfig(tmp_path, host="0.0.0.0", port=0)) as sockets:
        assert all(map(is_reached_from_outside, sockets))


def test_unix_socket_is_replaced_if_stale_and_removed_at_the_end(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    config = ServerConfig(tmp_path, uds=path)
    with listening(config) as (taken,):
        assert url_of(taken, False) == f"unix:{path}"
        with pytest.raises(OSError, match="another server listens there"), listening(config):
            pass
        assert path.is_socket()
    assert not path.exists()


def logged_until(process, text):
    """The log up to a line with `text`."""
    log = ""
    while text not in log:
        line = process.stderr.readline()
        assert line, log
        log += line
    return log


@pytest.mark.slow
def test_server_at_a_unix_socket_while_and_after_it_loads(
    model_directory, tmp_path, folder_of_namesakes
):
    """The replica is stopped while it loads. Only the user may connect with this umask, SIGHUP
    ends neither server nor replica, and nothing is imported from the current folder."""
    path = tmp_path / "socket"
    program = Path(sys.executable).with_name("stu-serve")
    command = [program, model_directory, "--uds", path]
    umask = os.umask(0o077)
    try:
        process = subprocess.Popen(
            [*command, "--cache-gib", "0.01"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    finally:
        os.umask(umask)
    try:
        log = logged_until(process, "answers 503")
        eventually(psutil.Process(process.pid).children)
        (replica,) = psutil.Process(process.pid).children()
        replica.suspend()
        assert path.stat().st_mode & 0o777 == 0o700
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://stu", timeout=SECONDS) as http:
            for probe in ("/health", "/ready"):
                answer = http.get(probe)
                assert answer.status_code == 503
                assert answer.json()["status"] == "loading the model"
            answer = http.post("/v1/completions", json=SHORT)
            assert answer.status_code == 503
            assert "being loaded" in answer.json()["error"]["message"]
            assert int(answer.headers["retry-after"]) >= 1
            replica.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGHUP)
            replica.resume()
            log += logged_until(process, "listening on")
            assert http.get("/ready").status_code == 200
            replica.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGHUP)
            assert http.post("/v1/completions", json=SHORT).status_code == 200
            assert psutil.Process(process.pid).children() == [replica]
        process.terminate()
        log += process.communicate(timeout=SECONDS)[1]
        assert process.returncode == 0
        assert log.count("SIGHUP is ignored") == 2
        assert not path.exists()
    finally:
        process.kill()
        process.wait()


def test_sigterm_that_an_import_catches_ends_the_server(tmp_path):
    code = """
import contextlib, signal, sys, types
from serve.server import cli
class Importing(types.ModuleType):
    @property
    def run_server(self):
        with contextlib.suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        return lambda *_: print("the server runs")
sys.modules["serve.server.http_server"] = Importing("http_server")
sys.exit(cli.main([sys.argv[1], "--port", "0"]))
"""
    done = forked.run(forked.python(), "-c", code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


def test_why_no_replica_starts_is_in_no_answer(tmp_path):
    replicas = Replicas(ReplicasConfig(tmp_path))
    replicas._failed_starts, replicas._last_error = [3], "/a/secret/path: no such folder"
    with pytest.raises(Unavailable, match=f"^{re.escape(NO_REPLICA)}$"):
        replicas.submit([])


@pytest.mark.slow
def test_messages_of_replicas_reach_no_client(model_directory, tmp_path):
    """The model is gone when the replica is to be started again."""
    folder = tmp_path / "some-secret-folder"
    shutil.copytree(model_directory, folder)
    with serving(folder, "--model-name", "model") as server, server.client() as http:
        shutil.rmtree(folder)
        server.replicas()[0].kill()
        answer = http.post("/v1/completions", json=SHORT)
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == NO_REPLICA
        eventually(lambda: "some-secret-folder" in "".join(server.lines))
        for path in ("/health", "/ready", "/v1/models", "/metrics"):
            assert "some-secret-folder" not in http.get(path).text
        assert "some-secret-folder" not in http.post("/v1/completions", json=SHORT).text


LINE_ENDS = "a\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029é\r\n"


def test_events_and_log_lines_are_one_line_for_every_reader():
    assert event({"text": LINE_ENDS}).splitlines()[1:] == [""]
    assert json.loads(event({"text": LINE_ENDS}).removeprefix("data: ")) == {"text": LINE_ENDS}
    record = logging.makeLogRecord({"msg": LINE_ENDS, "fields": {"prompts": [LINE_ENDS]}})
    (line,) = JsonFormatter().format(record).splitlines()
    assert json.loads(line)["prompts"] == [LINE_ENDS]
    assert "é" in line


def test_queue_time_ends_when_prefill_begins(code_model, code_tokenizer):
    """Two requests with room for one: the second is scheduled once the first has ended."""
    engine = Engine(code_model, code_tokenizer, EngineConfig(cache_gib=0.01, max_running=1))
    first, second = (engine.add(make_request([1, 2], count)) for count in (3, 1))
    scheduled, ended = {}, {}
    while engine.has_work:
        began = time.monotonic()
        outputs = engine.step()
        for request_id, when in engine.scheduled.items():
            assert began <= when <= time.monotonic()
            assert request_id not in scheduled
            scheduled[request_id] = when
        ended |= {output.request_id: time.monotonic() for output in outputs if output.finish_reason}
    assert scheduled[first] < ended[first] <= scheduled[second] < ended[second]


def test_queue_time_of_a_stream_is_the_first_that_the_engine_reports(model_directory):
    replicas = Replicas(ReplicasConfig(model_directory))
    stream = Stream(7, make_request([1], 5))
    replica = SimpleNamespace(streams={7: stream}, stats=None)
    stats = {**dict.fromkeys((field.name for field in fields(Stats)), 0), "flushes": {}}
    for scheduled in ([[7, 12.5], [8, 1.0]], [], [[7, 99.0]]):
        message = {"scheduled": scheduled, "outputs": [], "stats": stats}
        asyncio.run(replicas._hear(0, replica, message))
        assert stream.scheduled == 12.5
