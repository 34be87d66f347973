"""Traces of requests by OpenTelemetry, which a collector takes by OTLP over HTTP.

Each body that engines decode is a span, a child of the one that the request's `traceparent` names
(W3C Trace Context). It has a span for each phase of each choice: waiting in the queue, prefill and
decoding. Names of attributes are those of vLLM and of OpenTelemetry's conventions for generative
AI. OpenTelemetry's own variables apply, such as OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and
OTEL_EXPORTER_OTLP_HEADERS.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import stu
from serve.server.replicas.stream import Stream
from stu.common.errors import UserError
from stu.common.text import Json

SPAN_NAME = "llm_request"
NANOSECONDS = 1_000_000_000


class Answer(Protocol):
    """The answer to a body whose requests have ended."""

    arrived: float
    """Time of the arrival of the body, by the monotonic clock."""
    streams: Sequence[Stream]
    error: Exception | None
    """Why a request failed."""

    @property
    def choices_per_prompt(self) -> int:
        """Number of completions of each prompt."""

    def usage(self) -> Json:
        """Return OpenAI's numbers of tokens."""

    def finish_reasons(self) -> list[str]:
        """Return why each choice has ended."""


class Tracing:
    """Sends spans of requests to a processor."""

    def __init__(self, processor: SpanProcessor) -> None:
        own = {"service.name": "stu", "service.version": stu.__version__}
        resource = Resource.create({**own, **OTELResourceDetector().detect().attributes})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("stu", stu.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def record(
        self,
        operation: str,
        model: str,
        request_id: str,
        trace_context: Mapping[str, str],
        answer: Answer,
    ) -> None:
        """Send the spans of a body whose requests have just ended.

        Args:
            operation: Its name: text_completion, chat, embeddings or score.
            model: Name of the model.
            request_id: Id of the request.
            trace_context: Headers of the request that name its trace.
            answer: The answer to the body.
        """
        now, offset = time.monotonic(), time.time_ns() - time.monotonic_ns()

        def nanoseconds(moment: float) -> int:
            return round(moment * NANOSECONDS) + offset

        span = self._tracer.start_span(
            SPAN_NAME,
            self._propagator.extract(trace_context),
            SpanKind.SERVER,
            start_time=nanoseconds(answer.arrived),
        )
        if span.is_recording():
            span.set_attribute("gen_ai.operation.name", operation)
            span.set_attribute("gen_ai.response.model", model)
            span.set_attribute("gen_ai.request.id", request_id)
            _describe(span, answer, now)
            context = set_span_in_context(span)
            for index, stream in enumerate(answer.streams):
                for name, begin, end in phases(stream, answer.arrived, now):
                    phase = self._tracer.start_span(name, context, start_time=nanoseconds(begin))
                    phase.set_attribute("stu.choice.index", index)
                    phase.end(nanoseconds(end))
        span.end(nanoseconds(now))

    def close(self) -> None:
        """Send what is left. Takes seconds at most if the collector does not respond."""
        self._provider.shutdown()


def otlp_tracing(endpoint: str) -> Tracing:
    """Return the tracing that sends spans to a collector in the background."""
    return Tracing(BatchSpanProcessor(OTLPSpanExporter(endpoint)))


def phases(stream: Stream, arrived: float, ended: float) -> list[tuple[str, float, float]]:
    """Return the phases of a request that began: their names, begins and ends."""
    scheduled, first, last = stream.scheduled, stream.first_token, stream.last_token
    found = [("queue", arrived, ended if scheduled is None else scheduled)]
    if scheduled is not None:
        found.append(("prefill", scheduled, ended if first is None else first))
    if first is not None and last is not None:
        found.append(("decode", first, last))
    return found


def _describe(span: Span, answer: Answer, now: float) -> None:
    """Set the attributes and the status of the span of a body."""
    first, usage = answer.streams[0], answer.usage()
    sampling = first.request.sampling
    span.set_attributes(
        {
            "gen_ai.request.n": answer.choices_per_prompt,
            "gen_ai.request.max_tokens": sampling.max_new_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.response.finish_reasons": answer.finish_reasons(),
            "gen_ai.usage.num_sequences": len(answer.streams),
            "gen_ai.usage.prompt_tokens": usage["prompt_tokens"],
            "gen_ai.usage.completion_tokens": usage["completion_tokens"],
            "gen_ai.latency.e2e": now - answer.arrived,
        }
    )
    # Those of the first choice, as vLLM has them for each sequence.
    scheduled, token, last = first.scheduled, first.first_token, first.last_token
    if scheduled is not None:
        span.set_attribute("gen_ai.latency.time_in_queue", scheduled - answer.arrived)
    if token is not None:
        span.set_attribute("gen_ai.latency.time_to_first_token", token - answer.arrived)
    if scheduled is not None and token is not None and last is not None:
        span.set_attribute("gen_ai.latency.time_in_model_prefill", token - scheduled)
        span.set_attribute("gen_ai.latency.time_in_model_decode", last - token)
        span.set_attribute("gen_ai.latency.time_in_model_inference", last - scheduled)
    if (error := answer.error) is not None:
        # Without what the client wrote.
        reason = error.without_value() if isinstance(error, UserError) else str(error)
        span.set_status(Status(StatusCode.ERROR, reason))
