"""Prometheus metrics: vLLM's names where the meaning is the same, and this project's own.

No label comes from a request.
"""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.registry import Collector

from serve.request import FinishReason
from serve.server.operating.replica_metrics import ReplicasCollector
from serve.server.replicas.stream import Stream
from serve.server.replicas.versions import Versions
from serve.wire import Message

SECONDS = [0.001 * 2**i for i in range(20)]
TOKENS = [2.0**i for i in range(18)]
LABEL = "model_name"


class Metrics:
    """Metrics of the server.

    Args:
        prefix: Prefix of metrics that vLLM has too.
        names: Names of its models.
    """

    def __init__(self, prefix: str, names: Sequence[str]) -> None:
        self._registry = CollectorRegistry()
        self._families = _Families(self._registry, prefix)
        self._replicas = ReplicasCollector(prefix)
        self._registry.register(self._replicas)
        self.common_name = names[0] if len(names) == 1 else ""
        """Label of what concerns no model: the name of the only one, or empty if there are
        several."""

    def of_model(self, name: str, replicas: Versions) -> "ModelMetrics":
        """Return the metrics of a model, with those of its replicas."""
        self._replicas.add(name, replicas)
        return ModelMetrics(self._families, name, replicas)

    def register(self, collector: Collector) -> None:
        """Add the metrics of a collector."""
        self._registry.register(collector)

    def count_refused(self, status: int, model: str = "") -> None:
        """Count a request that was refused with a status. `model`: name of its model, if known."""
        label = model or self.common_name
        self._families.refused.labels(label, str(status)).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus's format."""
        return generate_latest(self._registry)


class ModelMetrics:
    """Metrics of the requests of a model."""

    def __init__(self, families: "_Families", name: str, replicas: Versions) -> None:
        self._families, self._name = families, name
        self.prompt_tokens = families.prompt_tokens.labels(name)
        self.generation_tokens = families.generation_tokens.labels(name)
        self.time_to_first_token = families.time_to_first_token.labels(name)
        self.inter_token = families.inter_token.labels(name)
        self.latency = families.latency.labels(name)
        self.queue_time = families.queue_time.labels(name)
        self._prefill_time = families.prefill_time.labels(name)
        self._decode_time = families.decode_time.labels(name)
        self._inference_time = families.inference_time.labels(name)
        self._request_prompt_tokens = families.request_prompt_tokens.labels(name)
        self._request_generation_tokens = families.request_generation_tokens.labels(name)
        self._step_tokens = families.step_tokens.labels(name)
        self._step = families.step.labels(name)
        replicas.step_observers.append(self._observe_step)

    def finished(self, reason: FinishReason | str, stream: Stream) -> None:
        """Count a request that ended, and the times that its engine took, unless others went
        first."""
        self._families.finished.labels(self._name, reason).inc()
        self._request_prompt_tokens.observe(len(stream.request.prompt_token_ids))
        self._request_generation_tokens.observe(len(stream.new_token_ids))
        if stream.is_background:
            return
        began, first, last = stream.scheduled, stream.first_token, stream.last_token
        if began is not None and first is not None and last is not None:
            self._prefill_time.observe(first - began)
            self._decode_time.observe(last - first)
            self._inference_time.observe(last - began)

    def count_use(self, key: str, num_prompt_tokens: int, num_new_tokens: int) -> None:
        """Count a body that ended for the key of this name."""
        counts = 1, num_prompt_tokens, num_new_tokens
        for counter, count in zip(self._families.of_keys, counts, strict=True):
            counter.labels(self._name, key).inc(count)

    def count_limited(self, key: str) -> None:
        """Count a request that was over a limit of the key of this name."""
        self._families.limited.labels(self._name, key).inc()

    def _observe_step(self, message: Message) -> None:
        if "step_seconds" in message:
            self._step.observe(message["step_seconds"])
        if "step_tokens" in message:
            self._step_tokens.observe(message["step_tokens"])


class _Families:
    """Metrics with the name of the model as their first label."""

    def __init__(self, registry: CollectorRegistry, prefix: str) -> None:
        def histogram(name: str, text: str, buckets: list[float]) -> Histogram:
            return Histogram(name, text, [LABEL], buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, [LABEL, *labels], registry=registry)

        self.prompt_tokens = counter(
            f"{prefix}:prompt_tokens", "Prompt tokens of requests that began."
        )
        self.generation_tokens = counter(f"{prefix}:generation_tokens", "New tokens.")
        self.finished = counter(
            f"{prefix}:request_success", "Requests that ended, by reason.", "finished_reason"
        )
        self.time_to_first_token = histogram(
            f"{prefix}:time_to_first_token_seconds",
            "Time from the arrival of a request to its first token.",
            SECONDS,
        )
        self.inter_token = histogram(
            f"{prefix}:inter_token_latency_seconds",
            "Time between two tokens of a request.",
            SECONDS,
        )
        self.latency = histogram(
            f"{prefix}:e2e_request_latency_seconds",
            "Time from the arrival of a request to its end.",
            SECONDS,
        )
        self.queue_time = histogram(
            f"{prefix}:request_queue_time_seconds",
            "Time from the arrival of a request to the start of its prefill.",
            SECONDS,
        )
        self.prefill_time = histogram(
            f"{prefix}:request_prefill_time_seconds",
            "Time from the start of a request's prefill to its first token.",
            SECONDS,
        )
        self.decode_time = histogram(
            f"{prefix}:request_decode_time_seconds",
            "Time from the first token of a request to its last.",
            SECONDS,
        )
        self.inference_time = histogram(
            f"{prefix}:request_inference_time_seconds",
            "Time from the start of a request's prefill to its last token.",
            SECONDS,
        )
        self.request_prompt_tokens = histogram(
            f"{prefix}:request_prompt_tokens", "Prompt tokens of a request.", TOKENS
        )
        self.request_generation_tokens = histogram(
            f"{prefix}:request_generation_tokens", "New tokens of a request.", TOKENS
        )
        self.step_tokens = histogram(
            f"{prefix}:iteration_tokens_total",
            "Tokens of an engine step, prefilled and generated.",
            TOKENS,
        )
        self.step = histogram("stu:step_seconds", "Time of engine steps with outputs.", SECONDS)
        self.of_keys = [
            counter(f"stu:key_{name}", f"{text}, by the name of the key.", "key")
            for name, text in {
                "requests": "Requests that ended",
                "prompt_tokens": "Prompt tokens of requests that ended",
                "generation_tokens": "New tokens of requests that ended",
            }.items()
        ]
        self.limited = counter(
            "stu:key_rate_limited",
            "Requests over a limit of a key, by the name of the key.",
            "key",
        )
        self.refused = counter(
            "stu:requests_refused", "Requests that were refused, by HTTP status.", "status"
        )
