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
from serve.request import Output, TokenLogprobs
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.slices import (
    PIECE_BYTES,
    Pauses,
    Threads,
    json_slices,
    pieces,
    sliced_line,
)
from serve.server.replicas.stream import Stream
from serve.server.replicas.supervisor import ReplicasConfig
from serve.server.response_routes import _sent
from serve.server.streams import PADDED_BYTES, Answer
from serve.wire import output_from_wire, output_to_wire, request_from_wire, request_to_wire
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


class PromptWriter(Writer):
    def write(self, piece):
        return {
            **super().write(piece),
            "logprobs": [values.top for values in piece.prompt_logprobs],
        }


async def test_log_probabilities_of_a_prompt_are_written_in_another_thread(code_tokenizer):
    """In a stream, too, and one by one."""
    top = dict.fromkeys(range(20), -1.5)
    logprobs = [TokenLogprobs(3, -1.0, top, 1)] * 1000
    output = Output(0, [5], "x\u2028", prompt_logprobs=logprobs, finish_reason="length")
    read = output_from_wire(output_to_wire(output, 0))
    writer, stream = PromptWriter(), Stream(0, make_request([1], 4))
    endpoint = TextCompletions(
        RequestBuilder(code_tokenizer, {}), tokenizer=code_tokenizer, model_name="m", max_seq_len=64
    )
    asked = CompletionBody(prompt="x", stream=True, stream_options={"include_obfuscation": True})
    answer = EndedAnswer(
        None, None, endpoint, asked, [stream], [writer], {"id": "a"}, 3, 1.0, 0.0, None
    )
    events = answer.events((0, read), answer.outputs(), asked.stream_options)
    text, done = [text async for text in events]
    assert done == "data: [DONE]\n\n"
    assert len(text.splitlines()) == 2
    assert len(text.encode()) % PADDED_BYTES == 0
    (choice,) = json.loads(text.removeprefix("data: "))["choices"]
    assert choice["text"] == "x\u2028"
    assert choice["logprobs"] == [{str(token): -1.5 for token in range(20)}] * 1000
    assert threading.current_thread() not in writer.threads
    assert max(map(len, json_slices({"choices": [choice]}))) < 40_000
    assert list(read.prompt_logprobs) == logprobs


def test_the_number_of_packed_log_probabilities_is_known_without_unpacking(monkeypatch):
    logprobs = [TokenLogprobs(3, -1.0, {3: -1.0}, 1)] * 70_000
    values = output_to_wire(Output(0, prompt_logprobs=logprobs), 0)
    packed = output_from_wire(values).prompt_logprobs
    monkeypatch.setattr("serve.wire.TokenLogprobs", None)
    assert len(packed) == 70_000
    assert packed


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


async def test_log_probabilities_of_a_response_are_written_in_another_thread(monkeypatch):
    threads = []

    def written(values):
        threads.append(threading.current_thread())
        return sliced_line(values)

    async def events():
        for values in {"type": "a", "delta": "x"}, {"type": "b", "part": [1, 2]}:
            yield values

    monkeypatch.setattr("serve.server.response_routes.sliced_line", written)
    for has_logprobs in True, False:
        texts = [text async for text in _sent(events(), False, has_logprobs)]
        data = [text.partition("data: ")[2] for text in texts]
        assert list(map(json.loads, data)) == [values async for values in events()]
        assert len(threads) == 1
    assert threading.current_thread() not in threads
