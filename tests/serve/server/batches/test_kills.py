"""Batches of servers that are killed, and started again with the same folder."""

import json
import random
import time
from array import array

import openai
import pytest

from tests.serve.server.batches.views import client_of, create, ended, make_row, results, watched
from tests.serve.server_process import SECONDS, ServerProcess


class Restarted:
    """A server of a folder that may be started again, with its `client`."""

    def __init__(self, model, folder):
        self.folder, self._arguments = folder, (model, "--batch-dir", folder)
        self._clients = []
        self.start()

    def start(self):
        self.server = ServerProcess(*self._arguments)
        self.client = client_of(self.server)
        self._clients.append(self.client)

    def kill(self):
        self.server.end()
        self.start()

    def end(self):
        self.server.end()
        for client in self._clients:
            client.close()


@pytest.fixture
def restarted(model_directory, tmp_path):
    restarted = Restarted(model_directory, tmp_path / "b")
    yield restarted
    restarted.end()


def wait_for(restarted, batch_id, num_completed, seconds=SECONDS):
    """Wait until a batch has some number of results, of which one comes in `seconds`."""
    found = -1
    while found < num_completed:
        before = found
        found = restarted.client.batches.retrieve(batch_id).request_counts.completed
        if found > before:
            deadline = time.monotonic() + seconds
        assert time.monotonic() < deadline
        time.sleep(0.002)


def run_through(restarted, num_rows, kills, max_tokens):
    """Run a batch whose server is killed once it has each of some numbers of results."""
    wrong = set(range(5, num_rows, num_rows // 5))
    rows = [
        make_row(number, max_tokens=max_tokens, temperature=-1 if number in wrong else 0)
        for number in range(num_rows)
    ]
    batch = create(restarted.client, rows)
    with watched(lambda: restarted.client, batch.id) as views:
        for num_completed in kills:
            wait_for(restarted, batch.id, num_completed)
            restarted.kill()
        batch = ended(restarted.client, batch.id)
    assert (batch.status, batch.request_counts.total) == ("completed", num_rows)
    output, errors = results(restarted.client, batch)
    names = {f"row {number}": number in wrong for number in range(num_rows)}
    assert output.keys() == {name for name, is_wrong in names.items() if not is_wrong}
    assert errors.keys() == {name for name, is_wrong in names.items() if is_wrong}
    return rows, output, views


def test_rows_have_one_result_whenever_the_server_is_killed(restarted):
    rows, output, views = run_through(restarted, 120, [30], max_tokens=20)
    assert any(0 < view.request_counts.completed < 100 for view in views)
    for row in rows[:5]:
        expected = restarted.server.post(row["url"], json=row["body"]).json()["choices"]
        assert output[row["custom_id"]]["response"]["body"]["choices"] == expected
    assert restarted.server.stop() == 0


def test_a_server_without_a_folder_names_the_option(server):
    with client_of(server) as client:
        for ask in (client.files.list, client.batches.list, lambda: client.files.retrieve("x")):
            with pytest.raises(openai.NotFoundError, match="--batch-dir"):
                ask()
        with pytest.raises(openai.NotFoundError, match="--batch-dir"):
            create(client, [])


@pytest.mark.slow
def test_ten_thousand_rows_and_ten_kills(restarted):
    kills = sorted(random.Random(0).sample(range(100, 9900), 10))
    run_through(restarted, 10_000, kills, max_tokens=3)


@pytest.mark.slow
def test_memory_does_not_grow_with_files(restarted):
    """A million rows are uploaded, checked, cancelled, and downloaded."""
    client, path = restarted.client, restarted.folder.parent / "rows.jsonl"
    with path.open("w") as file:
        for number in range(1_000_000):
            file.write(json.dumps(make_row(number)) + "\n")
    ended(client, create(client, [make_row(0)]).id)
    before = restarted.server.peak_bytes()
    with path.open("rb") as file:
        source = client.files.create(file=file, purpose="batch", timeout=600)
    batch = client.batches.create(
        input_file_id=source.id, endpoint="/v1/completions", completion_window="24h"
    )
    wait_for(restarted, batch.id, 1, seconds=600)
    client.batches.cancel(batch.id)
    batch = ended(client, batch.id, seconds=600)
    counts = batch.request_counts
    assert counts.total == counts.completed + counts.failed == 1_000_000
    numbers = array("B", bytes(1_000_000))
    for file_id in (batch.output_file_id, batch.error_file_id):
        with client.files.with_streaming_response.content(file_id, timeout=600) as answer:
            for line in answer.iter_lines():
                numbers[int(json.loads(line)["custom_id"].removeprefix("row "))] += 1
    assert set(numbers) == {1}
    assert restarted.server.peak_bytes() - before < 80 * 2**20
