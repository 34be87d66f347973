"""Batches of OpenAI's client: results, errors, cancelling, expiry and keys."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from openai.types.responses import Response

from tests.serve.server.batches.views import (
    URL,
    client_of,
    create,
    ended,
    make_row,
    results,
    upload,
    watched,
)
from tests.serve.server_process import eventually, serving

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def server(model_directory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    (folder / "keys").write_text("\n".join(KEYS))
    options = "--batch-dir", folder / "b", "--api-keys", folder / "keys", "--max-batch-rows", 3000
    with serving(model_directory, *options, "--max-running", 8) as server:
        yield server
        assert not [line for line in server.lines if '"error"' in line]


@pytest.fixture(scope="module")
def client(server):
    with client_of(server, KEYS[0]) as client:
        yield client


@pytest.fixture(scope="module")
def other(server):
    """The client of another key."""
    with client_of(server, KEYS[1]) as client:
        yield client


CHAT = {"prompt": None, "messages": [{"role": "user", "content": "\u2028 é"}], "max_tokens": 4}
EMBEDDING = {
    "input": ["a", "def"],
    **dict.fromkeys(("prompt", "max_tokens", "temperature", "seed")),
}


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (URL, {"logprobs": 2, "n": 2, "prompt": ["a", "b"]}),
        ("/v1/chat/completions", CHAT),
        ("/v1/embeddings", EMBEDDING),
    ],
)
def test_results_are_those_of_the_same_requests(client, server, url, body):
    rows = [make_row(number, url, **body) for number in range(5)]
    batch = ended(client, create(client, rows, endpoint=url, metadata={"a": "b"}).id)
    assert (batch.status, batch.metadata, batch.errors) == ("completed", {"a": "b"}, None)
    output, errors = results(client, batch)
    assert not errors
    with server.client(headers={"authorization": f"Bearer {KEYS[0]}"}) as http:
        for row in rows:
            expected = http.post(url, json=row["body"]).json()
            found = output[row["custom_id"]]["response"]["body"]
            for volatile in ("id", "created", "usage"):
                expected.pop(volatile, None), found.pop(volatile, None)
            assert found == expected


def test_rows_of_responses(client):
    """They may follow a stored response, and are files instead of stored responses."""
    first = client.responses.create(model="model", input="a", max_output_tokens=3)
    body = {"input": "b", "previous_response_id": first.id, "max_output_tokens": 3}
    body |= {"temperature": 0, "model": "model"}
    row = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": body}
    batch = ended(client, create(client, [row], endpoint="/v1/responses").id)
    output, errors = results(client, batch)
    assert not errors, errors
    found = Response.model_validate(output["a"]["response"]["body"])
    expected = client.responses.create(**body)
    assert (found.output_text, found.usage.input_tokens) == (
        expected.output_text,
        expected.usage.input_tokens,
    )
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(found.id)


def test_rows_count_for_their_key(server, client, other):
    header = {"authorization": f"Bearer {KEYS[0]}"}
    before = server.metric("stu:key_requests_total", **header)
    ended(other, create(other, [make_row(number) for number in range(3)]).id)
    assert server.metric("stu:key_requests_total", **header) == before + 3
    names = {json.loads(line)["client"] for line in list(server.lines) if "request ended" in line}
    assert "batches of key 2" in names


def test_rows_at_fault_are_in_the_error_file(client):
    faults = {
        "temperature": {"temperature": -1},
        "stream": {"stream": True},
        "model": {"model": "other"},
        "prompt": {"prompt": "x" * 500},
        "top": {"top": 1},
    }
    rows = [make_row(number, **fault) for number, fault in enumerate(faults.values())]
    batch = ended(client, create(client, [*rows, make_row(9)]).id)
    assert batch.status == "completed"
    output, errors = results(client, batch)
    assert list(output) == ["row 9"]
    for number, (param, status) in enumerate(zip(faults, (400, 400, 404, 400, 400), strict=True)):
        line = errors[f"row {number}"]
        assert line["error"] is None
        assert line["response"]["status_code"] == status
        assert line["response"]["body"]["error"]["param"] == param


WRONG_LINES = {
    b'{"custom_id": "a"': ("invalid_json_line", None, "not JSON"),
    b'"\xff"': ("invalid_json_line", None, "not JSON in UTF-8"),
    b"[1]": ("invalid_json_line", None, "JSON object"),
    b"[" * 100_000: ("invalid_json_line", None, "not JSON"),
    b"{}": ("missing_required_parameter", "custom_id", "missing"),
    json.dumps({**make_row(0), "body": None}): ("missing_required_parameter", "body", "missing"),
    json.dumps({**make_row(1), "custom_id": 3}): ("invalid_custom_id", "custom_id", "characters"),
    json.dumps({**make_row(2), "method": "GET"}): ("invalid_method", "method", '"POST"'),
    json.dumps(make_row(3, "/v1/embeddings")): ("invalid_url", "url", URL),
    json.dumps({**make_row(4), "body": []}): ("invalid_body", "body", "object"),
    json.dumps({**make_row(5), "url_": 1}): ("unknown_parameter", "url_", "did you mean 'url'"),
    json.dumps({**make_row(6), "custom_id": "good"}): (
        "duplicate_custom_id",
        "custom_id",
        "line 2 has it",
    ),
    b'{"x": "' + b"x" * 5_000_000 + b'"}': ("line_too_long", None, "5000010 bytes"),
}


def test_a_file_with_wrong_lines_fails_and_names_them(client):
    good = {**make_row(7), "custom_id": "good"}
    lines = [line if isinstance(line, bytes) else line.encode() for line in WRONG_LINES]
    batch = create(client, [b"", good, *lines, b"  ", make_row(8)])
    with watched(lambda: client, batch.id):
        batch = ended(client, batch.id)
    assert (batch.status, batch.errors.object) == ("failed", "list")
    found = batch.errors.data
    assert [error.line for error in found] == list(range(3, 3 + len(lines)))
    for error, (code, param, text) in zip(found, WRONG_LINES.values(), strict=True):
        assert (error.code, error.param) == (code, param)
        assert text in error.message


def test_files_that_are_empty_or_too_long_fail(client):
    (error,) = ended(client, create(client, [b"", b" "]).id).errors.data
    assert (error.code, error.line) == ("empty_file", None)
    rows = [b"" if number else make_row(number) for number in range(2)]
    rows += [make_row(number) for number in range(1, 3002)]
    (error,) = ended(client, create(client, rows).id).errors.data
    assert (error.code, error.line) == ("too_many_rows", 3002)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "1 day"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            "output_expires_after.seconds",
        ),
        ({"extra_body": {"x": 1}}, "x"),
    ],
)
def test_wrong_settings_are_refused_by_name(client, changes, param):
    with pytest.raises(openai.BadRequestError) as error:
        create(client, [make_row(0)], **changes)
    assert error.value.param == param


def test_half_a_surrogate_pair_in_an_id_is_refused(server):
    body = {"input_file_id": "\ud800", "endpoint": URL, "completion_window": "24h"}
    headers = {"authorization": f"Bearer {KEYS[0]}", "content-type": "application/json"}
    answer = server.post("/v1/batches", content=json.dumps(body), headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_file_id")


def test_ids_that_utf_8_cannot_hold_are_refused(server):
    half, key = "%ED%A0%80", {"authorization": f"Bearer {KEYS[0]}"}
    body = b'{"input_file_id": "\\ud800", "endpoint": "/v1/completions", "completion_window": "1h"}'
    headers = {**key, "content-type": "application/json"}
    answer = server.post("/v1/batches", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_file_id")
    for path, status in [
        (f"files/{half}", 404),
        (f"files/{half}/content", 404),
        (f"files?after={half}", 400),
        (f"files?purpose={half}", 200),
        (f"batches/{half}", 404),
        (f"batches?after={half}", 400),
    ]:
        assert server.get(f"/v1/{path}", headers=key).status_code == status, path


def test_a_cancelled_batch_has_results_of_all_rows(client):
    batch = create(client, [make_row(number, max_tokens=20) for number in range(1500)])
    with watched(lambda: client, batch.id) as views:
        eventually(lambda: views and views[-1].request_counts.completed)
        assert client.batches.cancel(batch.id).status == "cancelling"
        assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        batch = ended(client, batch.id)
    assert batch.status == client.batches.cancel(batch.id).status == "cancelled"
    output, errors = results(client, batch)
    assert len(output) + len(errors) == 1500
    assert 0 < len(output) < 1500
    for line in errors.values():
        assert (line["response"], line["error"]["code"]) == (None, "batch_cancelled")


def test_an_expired_batch_has_results_of_all_rows(client):
    rows = [make_row(number, max_tokens=50) for number in range(3000)]
    batch = create(client, rows, completion_window="1s")
    with watched(lambda: client, batch.id):
        batch = ended(client, batch.id)
    assert batch.status == "expired"
    assert batch.expired_at >= batch.expires_at == batch.created_at + 1
    output, errors = results(client, batch)
    assert len(output) + len(errors) == 3000
    assert {line["error"]["code"] for line in errors.values()} == {"batch_expired"}
    with pytest.raises(openai.ConflictError, match="expired can no longer be cancelled"):
        client.batches.cancel(batch.id)


def test_a_key_sees_only_its_own(client, other):
    mine = ended(client, create(client, [make_row(0)]).id)
    assert mine.id in {batch.id for batch in client.batches.list()}
    assert mine.id not in {batch.id for batch in other.batches.list()}
    assert mine.input_file_id not in {file.id for file in other.files.list()}
    asked = [
        lambda: other.batches.retrieve(mine.id),
        lambda: other.batches.cancel(mine.id),
        lambda: other.files.retrieve(mine.input_file_id),
        lambda: other.files.content(mine.output_file_id),
        lambda: other.files.delete(mine.output_file_id),
    ]
    for ask in asked:
        with pytest.raises(openai.NotFoundError):
            ask()
    settings = {"endpoint": URL, "completion_window": "24h"}
    with pytest.raises(openai.BadRequestError, match="input_file_id"):
        other.batches.create(input_file_id=mine.input_file_id, **settings)
    theirs = other.batches.create(input_file_id=upload(other, [make_row(0)]).id, **settings)
    assert ended(other, theirs.id).status == "completed"
    assert theirs.id in {batch.id for batch in other.batches.list()}
    assert theirs.id not in {batch.id for batch in client.batches.list()}
    assert len(client.files.content(mine.output_file_id).content) > 0


def test_batches_are_listed_in_pages(client):
    made = [create(client, [make_row(0)]).id for _ in range(5)]
    page = client.batches.list(limit=2)
    assert [batch.id for batch in page.data] == made[:2:-1]
    assert page.has_more
    pages = client.batches.list(limit=2, after=made[3])
    assert [batch.id for batch in pages][:3] == made[2::-1]
    with pytest.raises(openai.BadRequestError, match="after"):
        client.batches.list(after="batch_x")


def test_other_requests_go_first(model_directory, tmp_path):
    """Requests of one client that come while rows fill the replica: all end before the rows that
    wait, and they find the queue empty."""
    options = "--batch-dir", tmp_path / "b", "--max-running", 2, "--max-waiting", 5
    with serving(model_directory, *options) as server, client_of(server) as client:
        (replica,) = server.replicas()
        replica.send_signal(signal.SIGSTOP)
        batch = create(client, [make_row(number, max_tokens=9) for number in range(20)])
        eventually(lambda: server.metric("vllm:num_requests_waiting") == 3)
        with ThreadPoolExecutor() as pool:
            body = {"prompt": "x", "max_tokens": 9, "stop_at_eos": False}
            asked = {"json": body, "headers": {"x-request-id": "mine"}}
            answers = [pool.submit(server.post, URL, **asked) for _ in range(5)]
            eventually(lambda: server.metric("vllm:num_requests_waiting") == 8)
            replica.send_signal(signal.SIGCONT)
            assert [answer.result().status_code for answer in answers] == [200] * 5
        assert ended(client, batch.id).request_counts.completed == 20
        assert server.metric("vllm:request_success_total") == 25
        assert server.metric("vllm:e2e_request_latency_seconds_count") == 5, "rows have no times"
        assert server.metric("vllm:request_decode_time_seconds_count") == 5
        assert server.metric("stu:batch_rows_total") == 20
        assert server.metric("stu:batches_unfinished") == 0
        found = [json.loads(line) for line in list(server.lines) if "request ended" in line]
    assert [line["request_id"] for line in found[:7]].count("mine") == 5
    assert {line["client"] for line in found} == {"127.0.0.1", "batches"}
