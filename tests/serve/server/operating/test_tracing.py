"""Spans of requests, in a collector in memory."""

import time
from types import SimpleNamespace

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from serve.server.operating.tracing import Tracing
from serve.server.replicas.stream import Stream
from tests.serve.requests import make_request

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def collector(monkeypatch):
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    return InMemorySpanExporter()


@pytest.fixture
def tracing(collector):
    return Tracing(SimpleSpanProcessor(collector))


def stream(number, *moments):
    request = make_request([1, 2, 3], 7, temperature=0.5, top_p=0.9)
    made = Stream(number, request)
    made.scheduled, made.first_token, made.last_token = (*moments, None, None, None)[:3]
    return made


def record(tracing, arrived, *streams, error=None, context=()):
    """Record an answer whose requests have ended."""
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    answer = SimpleNamespace(
        arrived=arrived,
        streams=streams,
        choices_per_prompt=2,
        usage=lambda: usage,
        finish_reasons=lambda: ["length"] * len(streams),
        error=error,
    )
    tracing.record("chat", "m", "own", dict(context), answer)


def seconds(span):
    return (span.end_time - span.start_time) / 1e9


def test_a_request_is_a_span_with_a_span_for_each_phase(tracing, collector):
    arrived = time.monotonic() - 10
    context = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    first = stream(0, arrived + 2, arrived + 3, arrived + 7)
    second = stream(1, arrived + 4, arrived + 5, arrived + 6)
    record(tracing, arrived, first, second, context=context)
    *phases, span = collector.get_finished_spans()
    assert (span.name, span.kind) == ("llm_request", SpanKind.SERVER)
    assert format(span.context.trace_id, "032x") == TRACE
    assert format(span.parent.span_id, "016x") == PARENT
    assert span.context.trace_state["vendor"] == "1"
    assert span.start_time == pytest.approx(time.time_ns() - 10e9, abs=5e9)
    assert 10 <= seconds(span) == pytest.approx(span.attributes["gen_ai.latency.e2e"], abs=1e-3)
    assert span.status.status_code is StatusCode.UNSET
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.id": "own",
        "gen_ai.request.n": 2,
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.response.model": "m",
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.num_sequences": 2,
        "gen_ai.usage.prompt_tokens": 3,
        "gen_ai.usage.completion_tokens": 5,
    }
    latencies = {
        "time_in_queue": 2,
        "time_to_first_token": 3,
        "time_in_model_prefill": 1,
        "time_in_model_decode": 4,
        "time_in_model_inference": 5,
    }
    expected |= {f"gen_ai.latency.{name}": pytest.approx(s) for name, s in latencies.items()}
    assert {name: span.attributes[name] for name in expected} == expected
    assert span.resource.attributes["service.name"] == "stu"
    found = [(own.name, own.attributes["stu.choice.index"], seconds(own)) for own in phases]
    assert found == [
        ("queue", 0, pytest.approx(2)),
        ("prefill", 0, pytest.approx(1)),
        ("decode", 0, pytest.approx(4)),
        ("queue", 1, pytest.approx(4)),
        ("prefill", 1, pytest.approx(1)),
        ("decode", 1, pytest.approx(1)),
    ]
    assert {own.parent.span_id for own in phases} == {span.context.span_id}


def test_requests_that_end_early_have_the_phases_that_began(tracing, collector):
    arrived = time.monotonic() - 10
    record(tracing, arrived, stream(0), error=TimeoutError("too late"))
    record(tracing, arrived, stream(0, arrived + 1))
    queue, span, _, prefill, _ = collector.get_finished_spans()
    assert (queue.name, prefill.name) == ("queue", "prefill")
    assert queue.end_time == span.end_time
    assert seconds(prefill) == pytest.approx(9, abs=1)
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "too late")
    assert "gen_ai.latency.time_in_queue" not in span.attributes


@pytest.mark.parametrize("header", ["", "garbage", f"00-{TRACE}-{'0' * 16}-01"])
def test_a_request_without_a_valid_parent_begins_a_trace(tracing, collector, header):
    record(tracing, time.monotonic(), stream(0), context={"traceparent": header})
    span = collector.get_finished_spans()[-1]
    assert span.parent is None
    assert format(span.context.trace_id, "032x") != TRACE


def test_a_trace_that_is_not_sampled_has_no_spans(tracing, collector):
    context = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    record(tracing, time.monotonic(), stream(0), context=context)
    assert not collector.get_finished_spans()


def test_the_environment_names_the_service(monkeypatch, collector):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat")
    tracing = Tracing(SimpleSpanProcessor(collector))
    record(tracing, time.monotonic(), stream(0))
    assert collector.get_finished_spans()[0].resource.attributes["service.name"] == "chat"
