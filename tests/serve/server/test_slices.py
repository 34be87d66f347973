"""Long work is done in slices or in another thread, so that the event loop serves others."""

import asyncio
import json
import math
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.stats import Stats
from serve.openai.completions import TextCompletions
from serve.openai.schemas import CompletionBody
from serve.prompts import RequestBuilder
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.slices import PIECE_BYTES, Pauses, Threads, json_slices, pieces
from serve.server.replicas.stream import Stream
from serve.server.replicas.supervisor import ReplicasConfig
from serve.server.streams import Answer
from serve.wire import request_from_wire, request_to_wire
from tests.serve.requests import make_request

pytestmark = pytest.mark.anyio

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    LEAVES.filter(lambda leaf: not isinstance(leaf, float) or math.isfinite(leaf)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
LOGPROBS = {str(token): -1.5 * token for token in range(20)}


@given(VALUES)
def test_slices_are_the_json_of_the_whole(value):
    expected = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    assert "".join(json_slices(value)) == expected


def test_slices_and_pieces_are_small():
    value = {"tokens": ["größe"] * 100_000, "top": [LOGPROBS] * 10_000, "empty": [[], {}]}
    texts = list(json_slices(value))
    assert json.loads("".join(texts)) == value
    assert max(map(len, texts)) < 40_000
    parts = list(pieces(iter(texts)))
    assert b"".join(parts) == "".join(texts).encode()
    assert all(PIECE_BYTES <= len(part) < 2 * PIECE_BYTES for part in parts[:-1])


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        list(json_slices([math.inf]))


class Writer:
    def __init__(self):
        self.threads = []

    def write(self, piece):
        self.threads.append(threading.current_thread())
        return {"index": 0, "text": piece.text}


class EndedAnswer(Answer):
    async def outputs(self):
        for output in ():
            yield output


async def test_answer_is_written_in_another_thread(code_tokenizer):
    writers = [Writer(), Writer()]
    streams = [Stream(number, make_request([1], 4)) for number in range(2)]
    endpoint = TextCompletions(
        RequestBuilder(code_tokenizer, {}), tokenizer=code_tokenizer, model_name="m", max_seq_len=64
    )
    asked = CompletionBody(prompt="x", n=2)
    answer = EndedAnswer(
        None, None, endpoint, asked, streams, writers, {"id": "a"}, 3, 1.0, 0.0, None
    )
    body = json.loads(b"".join(await answer.whole()))
    usage = {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    usage["prompt_tokens_details"] = {"cached_tokens": 0}
    assert body == {"id": "a", "choices": [{"index": 0, "text": ""}] * 2, "usage": usage}
    threads = {thread for writer in writers for thread in writer.threads}
    assert threading.current_thread() not in threads


async def num_pauses(work):
    """The number of times that another task runs while `work` does."""
    count = 0

    async def other():
        nonlocal count
        while True:
            await asyncio.sleep(0)
            count += 1

    task = asyncio.create_task(other())
    await asyncio.sleep(0)
    before = count
    await work
    task.cancel()
    return count - before


@pytest.mark.parametrize(("slice_seconds", "expected"), [(-1, 10), (1000, 0)])
async def test_long_work_pauses(monkeypatch, slice_seconds, expected):
    async def work():
        pauses = Pauses()
        for _ in range(10):
            await pauses.pause_if_due()

    monkeypatch.setattr("serve.server.replicas.slices.SLICE_SECONDS", slice_seconds)
    assert await num_pauses(work()) == expected


async def test_large_message_of_a_replica_is_read_in_slices(tmp_path, monkeypatch):
    monkeypatch.setattr("serve.server.replicas.slices.SLICE_SECONDS", -1)
    replicas = Replicas(ReplicasConfig(tmp_path))
    replica = SimpleNamespace(streams={}, stats=None, is_ready=False)
    stats = {**dict.fromkeys(Stats.__dataclass_fields__, 0), "flushes": {}}
    outputs = [{"request_id": number} for number in range(10)]
    message = {"outputs": outputs, "stats": stats, "scheduled": [], "time": 0.0}
    assert await num_pauses(replicas._hear(0, replica, message)) == 10


def test_prompt_is_not_copied_for_a_replica():
    request = make_request(list(range(1000)), 4)
    values = request_to_wire(request)
    assert values["prompt_token_ids"] is request.prompt_token_ids
    assert request_from_wire(values) == request


async def test_client_has_at_most_half_of_the_threads():
    is_over, threads = threading.Event(), Threads()
    long = [asyncio.create_task(threads.run("a", is_over.wait)) for _ in range(100)]
    await asyncio.sleep(0)
    try:
        assert await asyncio.wait_for(threads.run("b", lambda: "done"), 30) == "done"
        assert not any(task.done() for task in long)
    finally:
        is_over.set()
    assert all(await asyncio.gather(*long))
    assert not threads._limits
