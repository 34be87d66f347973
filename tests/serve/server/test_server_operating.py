"""What operators rely on: ids, the log, probes, and where a server listens."""

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
from serve.server.connections import health_alone
from serve.server.exchange import Exchanges
from serve.server.listening import is_reached_from_outside, listening, url_of
from serve.server.logs import JsonFormatter
from serve.server.replicas.dispatch import NO_REPLICA, Replicas
from serve.server.replicas.stream import Stream, Unavailable
from serve.server.replicas.supervisor import ReplicasConfig
from serve.server.streams import event
from tests import forked
from tests.serve.requests import make_request
from tests.serve.server_process import SECONDS, eventually, serving

KEYS = "first-key", "second-key"
SHORT = {"prompt": "x", "max_tokens": 1, "stop_at_eos": False}
SECRET = "xyzzy"


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def server(model_directory, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    path.write_text("\n".join(KEYS) + "\n")
    with serving(model_directory, "--api-keys", path, "--max-body-bytes", 4096) as server:
        yield server
        assert not [line for line in server.lines if any(key in line for key in KEYS)]


@pytest.fixture(scope="module")
def http(server):
    with server.client(headers=bearer(KEYS[1])) as http:
        yield http


def num_refused(server, status):
    """The counter of refusals with a status."""
    text = httpx.get(f"{server.url}/metrics", headers=bearer(KEYS[0]), timeout=SECONDS).text
    found = re.search(rf'^stu:requests_refused_total.*status="{status}".* (\S+)$', text, re.M)
    return float(found[1]) if found else 0.0


def logged(server, **fields):
    """The one line of the log with these fields, once it is there."""

    def found():
        lines = [json.loads(line) for line in server.lines]
        return [line for line in lines if fields.items() <= line.items()]

    eventually(found)
    (line,) = found()
    return line


REFUSED = [
    (401, "GET", "/v1/models", {"headers": bearer("wrong")}, "the API key is missing or wrong"),
    (404, "GET", "/v1/nothing", {}, "Not Found"),
    (405, "GET", "/v1/completions", {}, "Method Not Allowed"),
    (400, "POST", "/v1/completions", {"json": {**SHORT, "n": 0}}, "n=0 is not allowed"),
    (400, "POST", "/v1/completions", {"json": {}}, 'field "prompt" is missing'),
    (400, "POST", "/v1/completions", {"json": {**SHORT, "max_tokens": 99}}, "max_seq_len=64"),
    (400, "POST", "/v1/chat/completions", {"content": b"{"}, "must be a JSON object"),
    (404, "POST", "/v1/completions", {"json": {**SHORT, "model": "y"}}, "the only model here"),
    (413, "POST", "/v1/completions", {"content": b"x" * 5000}, "4096 bytes"),
    (431, "GET", "/version", {"headers": {"x-large": "x" * 20_000}}, "the headers have more"),
]


@pytest.mark.parametrize(("status", "method", "path", "given", "reason"), REFUSED)
def test_refusals_have_an_id_and_a_line_in_the_log(
    server, http, status, method, path, given, reason
):
    own = f"gateway/{status}:{abs(hash(reason))}"
    headers = {"X-Request-Id": own, **given.get("headers", {})}
    before = num_refused(server, status)
    answer = http.request(method, path, **{**given, "headers": headers})
    assert answer.status_code == status
    assert answer.headers.get_list("x-request-id") == [own]
    line = logged(server, request_id=own)
    assert num_refused(server, status) == before + 1
    error = answer.json()["error"]
    assert reason in error["message"]
    assert reason.split("=")[0] in line["message"]
    assert (line["status"], line["method"], line["path"]) == (status, method, path)
    assert (line["param"], line["code"]) == (error["param"], error["code"])
    assert line["client"] == ("127.0.0.1" if status == 401 else "key 2")


def test_what_is_no_http_is_refused_with_an_id(server):
    """Before any application has seen it."""
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as raw:
        raw.settimeout(SECONDS)
        raw.sendall(b"no HTTP at all\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(2**16), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    own = re.search(rb"x-request-id: (\w{24})\r\n", answer)[1].decode()
    assert logged(server, request_id=own)["status"] == 400


def test_a_crowded_server_refuses_with_an_id():
    async def ask(path):
        transport = httpx.ASGITransport(health_alone(Exchanges(healthy, log_texts=False)))
        async with httpx.AsyncClient(transport=transport, base_url="http://stu") as http:
            return await http.get(path, headers={"x-request-id": "own"})

    async def healthy(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    for path, status in {"/health": 200, "/v1/models": 503}.items():
        answer = asyncio.run(ask(path))
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "own")


def test_own_ids_are_used_if_they_are_short_and_printable(server, http):
    for own in ("a", "x" * 128, "{7f-3e}/1"):
        answer = http.post("/v1/completions", json=SHORT, headers={"x-request-id": own})
        assert answer.headers["x-request-id"] == own
        assert answer.json()["id"] == f"cmpl-{own}"
        assert logged(server, request_id=own)["message"] == "request ended"
    given = set()
    for other in ("", "x" * 129, "a b", "größe".encode(), None):
        headers = {} if other is None else {"x-request-id": other}
        given.add(http.get("/health", headers=headers).headers["x-request-id"])
    assert len(given) == 5
    assert all(len(own) == 24 and own.isalnum() for own in given)


def test_what_refused_bodies_say_is_in_no_log(server, http):
    bodies = [
        {**SHORT, "prompt": [SECRET, {"a": SECRET}]},
        {**SHORT, "prompt": f"{SECRET} " * 40},
        {**SHORT, "prompt": f"{SECRET}\ud800"},
        {**SHORT, "prompt": [[1, SECRET]]},
        {**SHORT, "stop": [SECRET] * 140},
        {**SHORT, "stop": [SECRET * 300]},
        {**SHORT, "suffix": SECRET},
        {**SHORT, "metadata": SECRET},
        {**SHORT, "tools": [{"name": SECRET}]},
        {**SHORT, "logit_bias": {SECRET: 1}},
        {**SHORT, "response_format": {"type": SECRET}},
        {**SHORT, "response_format": {"type": "regex", "regex": f"{SECRET}("}},
        {**SHORT, "response_format": {"type": "json_schema", "json_schema": {SECRET: 1}}},
        {
            **SHORT,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"type": SECRET}},
            },
        },
    ]
    before = len(server.lines)
    for number, body in enumerate(bodies):
        headers = {"x-request-id": f"secret-{number}", "content-type": "application/json"}
        answer = http.post("/v1/completions", content=json.dumps(body), headers=headers)
        assert answer.status_code == 400, answer.text
        logged(server, request_id=f"secret-{number}", status=400)
    assert not [line for line in server.lines[before:] if SECRET in line]


def test_probes_need_no_key_and_take_head(server, http):
    for path in ("/health", "/ready", "/version", "/metrics", "/v1/models", "/tokenizer_info"):
        given, head = http.get(path), http.head(path)
        assert (given.status_code, head.status_code) == (200, 200)
        assert head.content == b""
        assert head.headers["content-type"] == given.headers["content-type"]
        status = 200 if path in ("/health", "/ready") else 401
        assert httpx.head(f"{server.url}{path}", timeout=SECONDS).status_code == status
    assert http.head("/v1/completions").status_code == 405
    assert http.get("/v1/completions").headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/v1/completions/", "/v1/models/", "/health/"])
def test_no_path_redirects(http, path):
    for method in ("GET", "POST"):
        answer = http.request(method, path, json=SHORT, headers={"host": "evil.example"})
        assert answer.status_code in (404, 405)
        assert "location" not in answer.headers
        assert "evil.example" not in answer.headers.values()


def refused_start(model, *options, **environment):
    """Exit code and log of a server that cannot start."""
    command = [forked.python(), "-m", "serve.server.cli", str(model), *map(str, options)]
    done = subprocess.run(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        timeout=SECONDS,
    )
    return done.returncode, done.stderr


def test_what_cannot_be_listened_at_is_noticed_before_the_model_is_loaded(tmp_path):
    """There is no model, which nobody has found out."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, log = refused_start(tmp_path, "--port", port)
    assert (code, log.count("\n")) == (2, 1)
    assert f"host='127.0.0.1', port={port}: the server cannot listen there (Address" in log
    file = tmp_path / "file"
    file.write_text("not to be overwritten")
    code, log = refused_start(tmp_path, "--uds", file)
    assert (code, log.count("\n")) == (2, 1)
    assert (
        f"uds {file}: the server cannot listen there (there is a file that is not a socket)" in log
    )
    assert file.read_text() == "not to be overwritten"
    code, log = refused_start(tmp_path, "--port", 0, "--tls-key", file, "--tls-certificate", file)
    assert (code, log.count("\n")) == (2, 1)
    assert f"tls_certificate {file}, tls_key {file}: cannot be used" in log
    code, log = refused_start(tmp_path, "--port", 0, STU_API_KEYS=" ")
    assert (code, log.count("\n")) == (2, 1)
    assert "STU_API_KEYS is set and has no key" in log


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("256.0.0.1", "host='256.0.0.1', port=0: the server cannot listen there"),
        ("192.0.2.1", "(Cannot assign requested address)"),
    ],
)
def test_addresses_of_no_use_are_named(tmp_path, host, message):
    config = ServerConfig(tmp_path, host=host, port=0)
    with pytest.raises(OSError, match=re.escape(message)), listening(config):
        pass


def test_all_addresses_of_a_host_have_one_port(tmp_path):
    with listening(ServerConfig(tmp_path, host="localhost", port=0)) as sockets:
        assert len({its.getsockname()[1] for its in sockets}) == 1
        assert not any(map(is_reached_from_outside, sockets))
    with listening(ServerConfig(tmp_path, host="0.0.0.0", port=0)) as sockets:
        assert all(map(is_reached_from_outside, sockets))


def test_unix_sockets(tmp_path):
    """A stale one is replaced, one that is used is not, and none is left behind."""
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
    """All that is logged up to a line with `text`."""
    log = ""
    while text not in log:
        line = process.stderr.readline()
        assert line, log
        log += line
    return log


def test_a_server_at_a_unix_socket_while_and_after_it_loads(
    model_directory, tmp_path, folder_of_namesakes
):
    """The engine is stopped while it loads. Nobody but the user may connect with this umask, and
    SIGHUP ends neither server nor engine. Nothing is imported from the current folder."""
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
                assert answer.json() == {"status": "loading the model"}
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


def test_listening_for_others_without_keys_is_warned_of(tmp_path):
    code, log = refused_start(tmp_path, "--host", "0.0.0.0", "--port", 0)
    assert code == 2  # there is no model
    (line,) = [json.loads(line) for line in log.splitlines() if "without API keys" in line]
    assert line["level"] == "warning"


def test_why_no_engine_starts_is_in_no_answer(tmp_path):
    replicas = Replicas(ReplicasConfig(tmp_path))
    replicas._failed_starts, replicas._last_error = [3], "/a/secret/path: no such folder"
    with pytest.raises(Unavailable, match=f"^{re.escape(NO_REPLICA)}$"):
        replicas.submit([])


@pytest.mark.slow
def test_no_word_of_an_engine_reaches_a_client(model_directory, tmp_path):
    """Its folder is gone when it is to be started again."""
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


def test_rows_of_a_batch_are_one_line_for_every_reader(run, tmp_path):
    code, rows = run([{"prompt": LINE_ENDS, "id": LINE_ENDS}], "--max-new-tokens", 2)
    assert code == 0
    assert [(row["prompt"], row["id"]) for row in rows] == [(LINE_ENDS, LINE_ENDS)]
    (target,) = tmp_path.glob("*.out.jsonl")
    assert len(target.read_text().splitlines()) == 1


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
        ended |= {its.request_id: time.monotonic() for its in outputs if its.finish_reason}
    assert scheduled[first] < ended[first] <= scheduled[second] < ended[second]


def test_a_stream_s_queue_time_is_the_engine_s_word(model_directory):
    """Whatever else happens between: prefill, steps, and how busy the server is."""
    replicas = Replicas(ReplicasConfig(model_directory))
    stream = Stream(7, make_request([1], 5))
    replica = SimpleNamespace(streams={7: stream}, stats=None)
    stats = {**dict.fromkeys((its.name for its in fields(Stats)), 0), "flushes": {}}
    for scheduled in ([[7, 12.5], [8, 1.0]], [], [[7, 99.0]]):
        message = {"scheduled": scheduled, "outputs": [], "stats": stats}
        asyncio.run(replicas._hear(0, replica, message))
        assert stream.scheduled == 12.5
