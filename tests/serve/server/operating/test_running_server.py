"""What changes while a server runs: keys, certificates, limits."""

import gzip
import itertools
import json
import re
import shutil
import signal
import ssl
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import httpx
import psutil
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from stu.model_dir import load_model, save_model
from tests.serve.adapters.adapter_folders import write_adapter
from tests.serve.conftest import LONG_SEQ_LEN, make_model
from tests.serve.requests import decode, make_request
from tests.serve.server_process import SECONDS, events, eventually, serving

PATH = "/v1/completions"
BODY = {"prompt": [1, 2, 3], "max_tokens": 4, "stop_at_eos": False, "seed": 7}
OPERATOR, SEARCH, OTHER = "sk-operator", "sk-search", "sk-other"
KEYS = f"""
# made by a test
{OPERATOR} name=operations admin
{SEARCH} name=search requests-per-minute=3 tokens-per-minute=1000
"""


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, certificate):
    """A folder with keys and a certificate that tests change."""
    folder = tmp_path_factory.mktemp("operating")
    (folder / "keys").write_text(KEYS)
    for name, path in zip(("certificate.pem", "key.pem"), certificate, strict=True):
        shutil.copy(path, folder / name)
    return folder


class Collector(BaseHTTPRequestHandler):
    """Takes traces by OTLP."""

    spans: ClassVar[list] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def collector():
    """A collector of traces: its URL and the spans that it has got."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{collector.server_port}/v1/traces", Collector.spans
        collector.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def other_model(tmp_path_factory, code_tokenizer):
    """A model of the same shape with other weights, and its directory."""
    model = make_model(code_tokenizer, LONG_SEQ_LEN)
    model.embedding.weight.data.mul_(-1).add_(0.1)
    path = tmp_path_factory.mktemp("other") / "model"
    save_model(path, model, code_tokenizer)
    return path


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, code_tokenizer):
    """The folder of an adapter, and the model that has it merged."""
    folder = tmp_path_factory.mktemp("adapter") / "own"
    return folder, write_adapter(folder, make_model(code_tokenizer, LONG_SEQ_LEN))


@pytest.fixture(scope="module")
def server(long_model_directory, folder, collector, adapted):
    options = ["--model-name", "base", "--lora-modules", f"tuned={adapted[0]}"]
    options += ["--otlp-traces-endpoint", collector[0]]
    options += ["--api-keys", folder / "keys", "--tls-certificate", folder / "certificate.pem"]
    options += ["--tls-key", folder / "key.pem", "--watchdog-seconds", 300]
    with serving(long_model_directory, *options, OTEL_BSP_SCHEDULE_DELAY="50") as server:
        yield server
        text = "".join(server.lines)
        assert not any(key in text for key in (OPERATOR, SEARCH, OTHER))


def hang_up(server, message):
    """Send SIGHUP, and wait until the log has a message."""
    before = len(server.lines)
    server.process.send_signal(signal.SIGHUP)
    eventually(lambda: any(message in line for line in server.lines[before:]))
    (line,) = [json.loads(line) for line in server.lines[before:] if message in line]
    return line


def by_key(server, name):
    """A counter of each key."""
    text = server.get("/metrics", headers=bearer(OPERATOR)).text
    return {
        key: float(value)
        for key, value in re.findall(rf'^{name}{{key="(.*?)",.*}} (\S+)$', text, re.M)
    }


def test_a_key_has_limits_and_counts_under_its_name(server):
    with server.client(headers=bearer(SEARCH)) as http:
        too_large = http.post(PATH, json={**BODY, "n": 10, "max_tokens": 600})
        assert too_large.status_code == 400
        assert (
            "more than the limit of 1000 tokens per minute" in too_large.json()["error"]["message"]
        )
        answers = [http.post(PATH, json=BODY) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        for left, answer in zip((2, 1, 0, 0), answers, strict=True):
            headers = answer.headers
            assert headers["x-ratelimit-limit-requests"] == "3"
            assert headers["x-ratelimit-remaining-requests"] == str(left)
            assert headers["x-ratelimit-limit-tokens"] == "1000"
            # What earlier requests did not use came back.
            assert 1000 - 4 * 7 <= int(headers["x-ratelimit-remaining-tokens"]) < 1000
        refused = answers[-1]
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    answer = server.post(PATH, json=BODY, headers=bearer(OPERATOR))
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
    assert by_key(server, "stu:key_requests_total") == {"search": 3, "operations": 1}
    assert by_key(server, "stu:key_prompt_tokens_total") == {"search": 9, "operations": 3}
    assert by_key(server, "stu:key_generation_tokens_total") == {"search": 12, "operations": 4}
    assert by_key(server, "stu:key_rate_limited_total") == {"search": 1}


def test_sighup_reads_keys_again_and_a_bad_file_changes_nothing(server, folder):
    status = {}

    def ask(http):
        for key in (OPERATOR, SEARCH, OTHER):
            status[key] = http.get("/v1/models", headers=bearer(key)).status_code
        return tuple(status.values())

    with server.client() as http:  # one connection
        assert ask(http) == (200, 200, 401)
        (folder / "keys").write_text(f"{OPERATOR} name=operations admin\n{OTHER} oops\n")
        line = hang_up(server, "the old API keys stay valid")
        assert line["level"] == "error"
        assert "keys: line 2: what follows the key is not allowed" in line["message"]
        assert ask(http) == (200, 200, 401)
        body = {**BODY, "prompt": "x", "max_tokens": 60, "stream": True}
        with http.stream("POST", PATH, json=body, headers=bearer(OPERATOR)) as stream:
            (folder / "keys").write_text(f"{OTHER}\n")
            hang_up(server, "1 API keys were read")
            assert ask(http) == (401, 401, 200)
            lines = list(stream.iter_lines())
            assert lines[-2] == "data: [DONE]"
        (folder / "keys").write_text(KEYS)
        hang_up(server, "2 API keys were read")
        assert ask(http) == (200, 200, 401)


def serial_number(server):
    """The serial number of the certificate that new connections get."""
    pem = ssl.get_server_certificate(server.address)
    command = ["openssl", "x509", "-noout", "-serial"]
    return subprocess.run(command, input=pem, text=True, capture_output=True, check=True).stdout


def local_port(answer):
    """The port of the connection that a good answer came on."""
    assert answer.status_code == 200
    return answer.extensions["network_stream"].get_extra_info("client_addr")[1]


def test_sighup_reads_the_certificate_again_and_connections_live_on(server, folder):
    limits = httpx.Limits(keepalive_expiry=None)
    with server.client(headers=bearer(OPERATOR), limits=limits) as http:
        port = local_port(http.get("/v1/models"))
        before = serial_number(server)
        saved = (folder / "key.pem").read_bytes()
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
        command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
        command += ["-out", folder / "certificate.pem", "-keyout", folder / "new.pem"]
        subprocess.run(command, check=True, capture_output=True)
        # A certificate with the key of another one.
        line = hang_up(server, "the old certificate stays in use")
        assert line["level"] == "error"
        assert serial_number(server) == before
        assert (folder / "key.pem").read_bytes() == saved
        shutil.move(folder / "new.pem", folder / "key.pem")
        hang_up(server, "the certificate was read from")
        assert serial_number(server) != before
        context = ssl.create_default_context(cafile=folder / "certificate.pem")
        assert httpx.get(f"{server.url}/health", verify=context, timeout=SECONDS).status_code == 200
        assert local_port(http.get("/v1/models")) == port


def test_a_collector_gets_the_trace_that_a_request_names(server, collector):
    _, spans = collector
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    context = {"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "traced"}
    answer = server.post(PATH, json={**BODY, "n": 2}, headers=bearer(OPERATOR) | context)
    assert answer.status_code == 200

    def own():
        return [span for span in spans if span.trace_id.hex() == trace]

    eventually(lambda: len(own()) == 7)
    (request,) = [span for span in own() if span.name == "llm_request"]
    assert request.parent_span_id.hex() == parent
    values = {
        pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in request.attributes
    }
    assert values["gen_ai.request.id"] == "traced"
    assert values["gen_ai.operation.name"] == "text_completion"
    assert values["gen_ai.usage.prompt_tokens"] == 3
    assert values["gen_ai.usage.completion_tokens"] == 8
    assert values["gen_ai.request.n"] == 2
    queued, first, e2e = (
        values[f"gen_ai.latency.{name}"] for name in ("time_in_queue", "time_to_first_token", "e2e")
    )
    assert 0 <= queued < first < e2e
    for name in ("queue", "prefill", "decode"):
        (one, other) = [span for span in own() if span.name == name]
        assert {one.parent_span_id, other.parent_span_id} == {request.span_id}
        assert request.start_time_unix_nano <= one.start_time_unix_nano <= one.end_time_unix_nano
        assert one.end_time_unix_nano <= request.end_time_unix_nano


def test_requests_may_name_an_adapter_as_their_model(
    server, adapted, long_model_directory, code_tokenizer
):
    models = {"base": load_model(long_model_directory), "tuned": adapted[1].eval()}
    with server.client(headers=bearer(OPERATOR)) as http, ThreadPoolExecutor() as pool:
        listed = http.get("/v1/models").json()["data"]
        assert [(own["id"], own["parent"]) for own in listed] == [("base", None), ("tuned", "base")]
        assert http.get("/v1/models/tuned").json() == listed[1]
        prompts = [[1, 2, 3], [7, 8]]
        asked = [(prompt, name) for prompt in prompts for name in models]
        texts = pool.map(
            lambda own: text_of(http, prompt=own[0], model=own[1], max_tokens=30, temperature=0),
            asked,
        )
        for (prompt, name), text in zip(asked, texts, strict=True):
            (expected,) = decode(models[name], code_tokenizer, [make_request(prompt, 30)])
            assert text == expected.text, name
        refused = http.post(PATH, json={**BODY, "model": "other"})
        assert refused.status_code == 404
        assert 'it must be one of "base", "tuned"' in refused.json()["error"]["message"]


def text_of(http, **body):
    answer = http.post(PATH, json={**BODY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


@contextmanager
def stopped_stream(server, http, num_tokens):
    """Begin a stream, and stop its replica, which the function that is yielded lets go on: it
    returns the text."""
    body = {**BODY, "max_tokens": num_tokens, "stream": True}
    (replica,) = server.replicas()
    with http.stream("POST", PATH, json=body) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        replica.suspend()

        def rest():
            replica.resume()
            answer.iter_lines = lambda: itertools.chain([first], lines)
            return "".join(event["choices"][0]["text"] for event in events(answer))

        try:
            yield rest
        finally:
            with suppress(psutil.NoSuchProcess):
                replica.resume()


def reload(http, **body):
    return http.post("/admin/reload", json=body, timeout=5 * SECONDS)


@pytest.mark.slow
def test_another_version_is_loaded_without_dropping_a_stream(
    server, long_model_directory, other_model
):
    num_tokens = 1000
    with server.client(headers=bearer(OPERATOR)) as http:
        assert http.post("/admin/reload", json={}, headers=bearer(SEARCH)).status_code == 403
        assert http.get("/admin/reload", headers=bearer(SEARCH)).status_code == 403
        before, short = text_of(http, max_tokens=num_tokens), text_of(http)
        (old,) = server.replicas()
        with stopped_stream(server, http, num_tokens) as rest, server.client() as other:
            other.headers = http.headers
            assert reload(other, path="no/such").status_code == 400
            answer = reload(other, path=str(other_model), one_by_one=False)
            assert answer.status_code == 200, answer.text
            state = {"model": "base", "path": str(other_model), "version": 2, "replicas_ready": 1}
            state |= {"state": "finishing", "one_by_one": False}
            assert answer.json() | state == answer.json()
            assert reload(other).status_code == 409
            after = text_of(other)
            assert after != short
            assert len(server.replicas()) == 2
            assert rest() == before
        eventually(lambda: http.get("/admin/reload").json()["state"] == "idle")
        assert old.pid not in [replica.pid for replica in server.replicas()]
        assert text_of(http) == after
        assert server.metric("stu:replica_restarts_total", **bearer(OPERATOR)) == 0
        assert http.get("/health").status_code == 200


@pytest.mark.slow
def test_the_only_replica_is_exchanged_while_new_requests_wait(
    server, long_model_directory, other_model, tmp_path
):
    num_tokens = 1000
    with server.client(headers=bearer(OPERATOR)) as http, ThreadPoolExecutor() as pool:
        assert reload(http, path=str(other_model), one_by_one=True).status_code == 200
        eventually(lambda: http.get("/admin/reload").json()["state"] == "idle")
        before, short = text_of(http, max_tokens=num_tokens), text_of(http)
        with stopped_stream(server, http, num_tokens) as rest, server.client() as other:
            other.headers = http.headers
            body = {"path": str(long_model_directory), "one_by_one": True}
            num_lines = len(server.lines)
            reloading = pool.submit(reload, other, **body)
            # From then on new requests wait.
            eventually(lambda: any("is loaded from" in line for line in server.lines[num_lines:]))
            assert other.get("/admin/reload").json()["state"] == "loading"
            assert other.get("/health").status_code == 200
            waiting = pool.submit(text_of, other)
            assert rest() == before
            assert reloading.result().status_code == 200
            assert reloading.result().json()["one_by_one"]
            assert waiting.result() == text_of(other) != short
        # A model that no replica can load.
        shutil.copytree(long_model_directory, tmp_path / "model")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_filters": 5}))
        for one_by_one in (True, False):
            version = http.get("/admin/reload").json()["version"]
            refused = reload(http, path=str(tmp_path / "model"), one_by_one=one_by_one)
            assert refused.status_code == 500
            assert f"version {version} goes on" in refused.json()["error"]["message"]
            assert text_of(http) == waiting.result()
