"""Batches of OpenAI's client, and what it may see of them at each moment."""

import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from openai import APIConnectionError, OpenAI

from tests.serve.server_process import SECONDS

URL = "/v1/completions"
ENDED = ("completed", "failed", "expired", "cancelled")
LATER = {
    "validating": {"failed", "in_progress", "finalizing", "completed", "expired"}
    | {"cancelling", "cancelled"},
    "in_progress": {"finalizing", "completed", "expired", "cancelling", "cancelled"},
    "finalizing": {"completed", "expired"},
    "cancelling": {"cancelled"},
}
"""Statuses that may come after each status."""
TIMES = [f"{status}_at" for status in ("in_progress", "finalizing", "cancelling", *ENDED)]


def make_row(number, url=URL, **body):
    own = {"prompt": f"def f{number}(", "max_tokens": 3, "seed": number, "temperature": 1, **body}
    return {"custom_id": f"row {number}", "method": "POST", "url": url, "body": own}


def client_of(server, key="none", **settings):
    settings = {"max_retries": 0, "timeout": SECONDS, **settings}
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, **settings)


def upload(client, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    content = b"".join(line + b"\n" for line in lines)
    return client.files.create(file=("rows.jsonl", content), purpose="batch")


def create(client, rows, **settings):
    settings = {"endpoint": URL, "completion_window": "24h", **settings}
    return client.batches.create(input_file_id=upload(client, rows).id, **settings)


def ended(client, batch_id, seconds=SECONDS):
    """The batch once it has ended."""
    deadline = time.monotonic() + seconds
    while (batch := client.batches.retrieve(batch_id)).status not in ENDED:
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
    return batch


def lines_of(client, file_id):
    """The lines of a file with results, by the ids of their rows, each of which has one."""
    if file_id is None:
        return {}
    lines = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines), "a row has two results"
    assert len({line["id"] for line in lines}) == len(lines)
    return found


def results(client, batch):
    """Lines of the output file and of the error file of a batch that has ended."""
    output, errors = (lines_of(client, id) for id in (batch.output_file_id, batch.error_file_id))
    assert not output.keys() & errors.keys(), "a row has two results"
    counts = batch.request_counts
    assert (len(output), len(errors)) == (counts.completed, counts.failed)
    assert counts.total == counts.completed + counts.failed
    for line in output.values():
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        assert line["id"] == f"batch_req_{line['response']['request_id']}"
    usages = [line["response"]["body"]["usage"] for line in output.values()]
    inputs = [usage.get("prompt_tokens") or usage["input_tokens"] for usage in usages]
    assert batch.usage.input_tokens == sum(inputs)
    assert batch.usage.total_tokens == sum(usage["total_tokens"] for usage in usages)
    return output, errors


def check_views(views):
    """Check what a client has seen of a batch, one time after the other."""
    for batch in views:
        reached = {name for name in TIMES if getattr(batch, name) is not None}
        status, counts = batch.status, batch.request_counts
        assert f"{status}_at" in reached or status == "validating", batch
        assert (
            reached
            <= {
                "validating": set(),
                "in_progress": {"in_progress_at"},
                "finalizing": {"in_progress_at", "finalizing_at"},
                "completed": {"in_progress_at", "finalizing_at", "completed_at"},
                "expired": {"in_progress_at", "finalizing_at", "expired_at"},
                "failed": {"failed_at"},
                "cancelling": {"in_progress_at", "cancelling_at"},
                "cancelled": {"in_progress_at", "cancelling_at", "cancelled_at"},
            }[status]
        )
        times = [batch.created_at, *sorted(getattr(batch, name) for name in reached)]
        assert times == sorted(times)
        assert counts.completed + counts.failed <= counts.total, batch
        assert (counts.total > 0) == (batch.in_progress_at is not None), batch
        if status in ("completed", "expired", "cancelled"):
            assert counts.completed + counts.failed == counts.total
            assert (batch.output_file_id is not None) == (counts.completed > 0), batch
            assert (batch.error_file_id is not None) == (counts.failed > 0), batch
        else:
            assert batch.output_file_id is None, batch
            assert batch.error_file_id is None, batch
        assert (batch.errors is not None) == (status == "failed")
    for before, after in itertools.pairwise(views):
        if before.status in ENDED:
            assert after == before
        assert after.status in {before.status} | LATER.get(before.status, set())
        for name in TIMES:
            assert getattr(before, name) in (None, getattr(after, name)), name
        for name in ("completed", "failed", "total"):
            assert getattr(before.request_counts, name) <= getattr(after.request_counts, name)
        assert before.usage.total_tokens <= after.usage.total_tokens
        for name in ("id", "created_at", "expires_at", "metadata", "input_file_id", "endpoint"):
            assert getattr(before, name) == getattr(after, name)


@contextmanager
def watched(find_client, batch_id):
    """What a client sees of a batch during the block, checked at its end.

    find_client: Returns the client of the server that runs, or has just been killed.
    """
    views, is_over = [], threading.Event()

    def watch():
        while not is_over.wait(0.01):
            with suppress(APIConnectionError):  # the server was killed
                views.append(find_client().batches.retrieve(batch_id))

    with ThreadPoolExecutor() as pool:
        watching = pool.submit(watch)
        try:
            yield views
        finally:
            is_over.set()
        watching.result()
    check_views(views)
