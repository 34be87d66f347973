"""Files of a server: uploads, lists, downloads, deletion and limits."""

import json
import shutil
import time

import httpx
import openai
import pytest

from tests.serve.server.batches.views import client_of, create, ended, make_row, upload
from tests.serve.server.test_clients import CLIENTS, INSTALLED, answers_of, install
from tests.serve.server_process import SECONDS, serving

LIMITS = ("--max-file-bytes", 6_000_000, "--max-stored-bytes", 10_000_000)
START = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
FILE = b'Content-Disposition: form-data; name="file"; filename="\xc3\xa9.jsonl"\r\n\r\n'


@pytest.fixture(scope="module")
def server(model_directory, tmp_path_factory):
    options = "--batch-dir", tmp_path_factory.mktemp("files") / "b", "--body-timeout-seconds", 2
    with serving(model_directory, *options, *LIMITS) as server:
        yield server
        assert not [line for line in server.lines if '"error"' in line]


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


def test_a_file_comes_back_as_it_was(client):
    content = bytes(range(256)) * 20_000  # more than another body may have
    uploaded = client.files.create(file=("é.jsonl", content), purpose="batch")
    assert (uploaded.filename, uploaded.bytes, uploaded.purpose) == ("é.jsonl", 5_120_000, "batch")
    assert uploaded.expires_at == uploaded.created_at + 30 * 24 * 3600
    assert client.files.retrieve(uploaded.id) == uploaded
    with client.files.with_streaming_response.content(uploaded.id) as answer:
        assert answer.headers["content-length"] == "5120000"
        assert b"".join(answer.iter_bytes()) == content
    deleted = client.files.delete(uploaded.id)
    assert (deleted.id, deleted.deleted) == (uploaded.id, True)
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="no such file"):
            ask(uploaded.id)


def test_files_are_listed_in_pages(client):
    made = [upload(client, [make_row(number)]).id for number in range(5)]
    batch = ended(client, create(client, [make_row(0)]).id)
    newest = [found.id for found in client.files.list(limit=2)]
    assert newest[:2] == [batch.output_file_id, batch.input_file_id]
    assert newest[2:7] == made[::-1]
    oldest = [found.id for found in client.files.list(limit=3, order="asc")]
    assert oldest == newest[::-1]
    (output,) = client.files.list(purpose="batch_output")
    assert (output.id, output.bytes > 0) == (batch.output_file_id, True)
    with pytest.raises(openai.BadRequestError, match="input_file_id"):
        client.batches.create(
            input_file_id=output.id, endpoint="/v1/completions", completion_window="24h"
        )
    found = []
    for file in client.files.list(limit=2):  # pages go on after files that are deleted meanwhile
        found.append(file.id)
        client.files.delete(file.id)
    assert found == newest
    assert not list(client.files.list())


def test_a_client_may_say_when_a_file_expires(client):
    after = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=b"{}", purpose="batch", expires_after=after)
    assert file.expires_at == file.created_at + 3600
    rows = json.dumps(make_row(0)).encode()
    source = client.files.create(file=("a", rows), purpose="batch")
    batch = client.batches.create(
        input_file_id=source.id,
        endpoint="/v1/completions",
        completion_window="24h",
        output_expires_after=after,
    )
    output = client.files.retrieve(ended(client, batch.id).output_file_id)
    assert output.expires_at == output.created_at + 3600
    with pytest.raises(openai.BadRequestError, match=r"expires_after\[seconds\]"):
        client.files.create(file=b"", purpose="batch", expires_after={**after, "seconds": 3599})


def test_the_input_of_a_batch_can_be_deleted(client):
    batch = create(client, [make_row(number, max_tokens=9) for number in range(300)])
    client.files.delete(batch.input_file_id)
    assert ended(client, batch.id).request_counts.completed == 300
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(batch.input_file_id)


@pytest.mark.parametrize(
    ("form", "param", "text"),
    [
        ({"files": {"file": b""}}, "purpose", '"batch"'),
        ({"files": {"file": b""}, "data": {"purpose": "assistants"}}, "purpose", '"batch"'),
        ({"files": {"other": b""}}, "other", "one of file"),
        ({"files": {"purpose": (None, b"batch")}}, "file", 'no field "file"'),
        ({"files": [("file", b"a"), ("file", b"b")]}, "file", "twice"),
        ({"files": {"purpose": (None, b"x" * 2000)}}, "purpose", "1024 bytes"),
        ({"files": {"purpose": (None, b"\xff")}}, "purpose", "UTF-8"),
        ({"json": {"purpose": "batch"}}, "content-type", "multipart/form-data"),
        (
            {"content": b"--", "headers": {"content-type": "multipart/form-data"}},
            *["content-type"] * 2,
        ),
        ({"content": START + FILE + b"{}\r\n"}, "body", "too early"),
        ({"content": START + b"x: " + b"y" * 20_000}, "body", "header"),
        ({"content": b"no form"}, "body", "no form"),
        ({"files": {"file": bytes(6_000_001)}, "data": {"purpose": "batch"}}, "file", "divide it"),
    ],
)
def test_forms_that_are_not_allowed(server, form, param, text):
    form = {"headers": {"content-type": "multipart/form-data; boundary=x"}, **form}
    if "content" not in form:
        del form["headers"]
    answer = server.post("/v1/files", **form)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert text in answer.json()["error"]["message"]


def test_forms_of_other_clients(server, client):
    body = START + FILE + b"{}\r\n--x--\r\n"
    headers = {"content-type": 'Multipart/Form-Data; boundary="x"'}
    for content in (body, (bytes([byte]) for byte in body)):
        answer = server.post("/v1/files", content=content, headers=headers)
        assert (answer.status_code, answer.json()["filename"]) == (200, "é.jsonl")
        assert client.files.content(answer.json()["id"]).content == b"{}"


def test_uploads_have_limits(server, client):
    answer = server.post("/v1/files", content=bytes(6_100_000))
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")
    kept = [client.files.create(file=bytes(4_500_000), purpose="batch") for _ in range(2)]
    with pytest.raises(
        openai.BadRequestError, match=r"beside the 9\d{6} bytes of your other files"
    ):
        client.files.create(file=bytes(1_000_000), purpose="batch")
    client.files.delete(kept[0].id)
    client.files.create(file=bytes(1_000_000), purpose="batch")


def slow(content, seconds):
    yield content[:10]
    time.sleep(seconds)
    yield content[10:]


def test_an_upload_may_take_longer_than_another_body(server):
    """As many times as the file may be larger."""
    headers = {"content-type": "multipart/form-data; boundary=x"}
    body = START + FILE + b"{}\r\n--x--\r\n"
    with httpx.Client(base_url=server.url, timeout=SECONDS) as http:
        asked = {"content": slow(body, 2.6), "headers": headers}
        assert http.post("/v1/files", **asked).status_code == 200


@pytest.mark.slow
def test_node_client(model_directory, tmp_path):
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    install("npm")
    (tmp_path / "node_modules").symlink_to(INSTALLED / "node_modules")
    script = shutil.copy(CLIENTS / "batches.mjs", tmp_path)
    with serving(model_directory, "--batch-dir", tmp_path / "b") as server:
        answers = answers_of(server, "node", script)
    assert answers == {
        "file": ["zeilen é.jsonl", 3600],
        "content": True,
        "batch": ["completed", {"total": 2, "completed": 1, "failed": 1}, {"name": "é"}],
        "output_file_id": ["good", 200],
        "error_file_id": ["bad", 400],
        "files": ["batch", "batch_output", "batch_output"],
        "batches": True,
        "cancel": 409,
        "delete": True,
        "deleted": 404,
    }
