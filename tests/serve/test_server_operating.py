"""What operators rely on: ids, the log, probes, and where a server listens."""

import json

import httpx
import pytest

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


def logged(server, **fields):
    """The one line of the log with these fields, once it is there."""

    def found():
        lines = [json.loads(line) for line in server.lines]
        return [line for line in lines if fields.items() <= line.items()]

    eventually(found)
    (line,) = found()
    return line


REFUSED = [
    (401, "GET", "/v1/models", {"headers": bearer("wrong")}, "no valid API key"),
    (404, "GET", "/v1/nothing", {}, "Not Found"),
    (405, "GET", "/v1/completions", {}, "Method Not Allowed"),
    (400, "POST", "/v1/completions", {"json": {**SHORT, "n": 0}}, "n=0 is not allowed"),
    (400, "POST", "/v1/completions", {"json": {}}, 'field "prompt" is missing'),
    (400, "POST", "/v1/completions", {"json": {**SHORT, "max_tokens": 99}}, "max_seq_len=64"),
    (400, "POST", "/v1/chat/completions", {"content": b"{"}, "must be a JSON object"),
    (404, "POST", "/v1/completions", {"json": {**SHORT, "model": "y"}}, "is not served here"),
    (413, "POST", "/v1/completions", {"content": b"x" * 5000}, "4096 bytes"),
    (431, "GET", "/version", {"headers": {"x-large": "x" * 20_000}}, "the headers have more"),
]


@pytest.mark.parametrize(("status", "method", "path", "given", "reason"), REFUSED)
def test_refusals_have_an_id_and_a_line_in_the_log(
    server, http, status, method, path, given, reason
):
    own = f"gateway/{status}:{abs(hash(reason))}"
    headers = {"X-Request-Id": own, **given.get("headers", {})}
    answer = http.request(method, path, **{**given, "headers": headers})
    assert answer.status_code == status
    assert answer.headers.get_list("x-request-id") == [own]
    line = logged(server, request_id=own)
    error = answer.json()["error"]
    assert reason in error["message"]
    assert reason.split("=")[0] in line["message"]
    assert (line["status"], line["method"], line["path"]) == (status, method, path)
    assert (line["param"], line["code"]) == (error["param"], error["code"])
    assert line["client"] == ("127.0.0.1" if status == 401 else "key 2")


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
        {**SHORT, "stop": [SECRET] * 40},
        {**SHORT, "stop": [SECRET * 300]},
        {**SHORT, "suffix": SECRET},
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
        assert answer.status_code == 404
        assert "location" not in answer.headers
        assert "evil.example" not in answer.headers.values()
