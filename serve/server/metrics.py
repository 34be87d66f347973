"""Prometheus metrics: vLLM's names where the meaning is the same, and this project's own.

No label comes from a request.
"""

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.cache.base import ConvolutionCacheInfo
from serve.request import FinishReason
from serve.server.replicas.stream import Stream
from serve.server.replicas.versions import Versions
from serve.wire import Message

SECONDS = [0.001 * 2**i for i in range(20)]
TOKENS = [2.0**i for i in range(18)]


class Metrics:
    """Metrics of the server. `prefix` is that of metrics that vLLM has too."""

    def __init__(self, replicas: Versions, prefix: str, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._label = {"model_name": model_name}

        def histogram(name: str, text: str, buckets: list[float]) -> Histogram:
            made = Histogram(
                name, text, list(self._label), buckets=buckets, registry=self._registry
            )
            return made.labels(**self._label)

        def counter(name: str, text: str) -> Counter:
            made = Counter(f"{prefix}:{name}", text, list(self._label), registry=self._registry)
            return made.labels(**self._label)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that began.")
        self.generation_tokens = counter("generation_tokens", "New tokens.")
        self._finished = Counter(
            f"{prefix}:request_success",
            "Requests that ended, by reason.",
            [*self._label, "finished_reason"],
            registry=self._registry,
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
        labels = [*self._label, "key"]
        self._of_keys = [
            Counter(
                f"stu:key_{name}",
                f"{text}, by the name of the key.",
                labels,
                registry=self._registry,
            )
            for name, text in {
                "requests": "Requests that ended",
                "prompt_tokens": "Prompt tokens of requests that ended",
                "generation_tokens": "New tokens of requests that ended",
            }.items()
        ]
        self._limited = Counter(
            "stu:key_rate_limited",
            "Requests over a limit of a key, by the name of the key.",
            labels,
            registry=self._registry,
        )
        self.refused = Counter(
            "stu:requests_refused",
            "Requests that were refused, by HTTP status.",
            [*self._label, "status"],
            registry=self._registry,
        )
        self._step_tokens = histogram(
            f"{prefix}:iteration_tokens_total",
            "Tokens of an engine step, prefilled and generated.",
            TOKENS,
        )
        self._step = histogram("stu:step_seconds", "Time of engine steps with outputs.", SECONDS)
        self._registry.register(_ReplicasCollector(replicas, prefix, model_name))
        replicas.step_observers.append(self._observe_step)

    def finished(self, reason: FinishReason | str, stream: Stream) -> None:
        """Count a request that ended, and the times that its engine took, unless others went
        first."""
        self._finished.labels(**self._label, finished_reason=reason).inc()
        self.request_prompt_tokens.observe(len(stream.request.prompt_token_ids))
        self.request_generation_tokens.observe(len(stream.new_token_ids))
        if stream.is_background:
            return
        began, first, last = stream.scheduled, stream.first_token, stream.last_token
        if began is not None and first is not None and last is not None:
            self.prefill_time.observe(first - began)
            self.decode_time.observe(last - first)
            self.inference_time.observe(last - began)

    def count_use(self, key: str, num_prompt_tokens: int, num_new_tokens: int) -> None:
        """Count a body that ended for the key of this name."""
        counts = 1, num_prompt_tokens, num_new_tokens
        for counter, count in zip(self._of_keys, counts, strict=True):
            counter.labels(**self._label, key=key).inc(count)

    def count_limited(self, key: str) -> None:
        """Count a request that was over a limit of the key of this name."""
        self._limited.labels(**self._label, key=key).inc()

    def register(self, collector: Collector) -> None:
        """Add the metrics of a collector."""
        self._registry.register(collector)

    def count_refused(self, status: int) -> None:
        """Count a request that was refused with a status."""
        self.refused.labels(**self._label, status=str(status)).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus's format."""
        return generate_latest(self._registry)

    def _observe_step(self, message: Message) -> None:
        if "step_seconds" in message:
            self._step.observe(message["step_seconds"])
        if "step_tokens" in message:
            self._step_tokens.observe(message["step_tokens"])


class _ReplicasCollector(Collector):
    """Metrics that replicas report."""

    def __init__(self, replicas: Versions, prefix: str, model_name: str) -> None:
        self._replicas, self._prefix, self._model_name = replicas, prefix, model_name

    def collect(self) -> Iterable[Metric]:
        """Yield the current metrics, summed over replicas."""
        stats, replicas = self._replicas.stats, self._replicas
        totals = replicas.totals()

        def total(name: str) -> float:
            return float(sum(getattr(replica_stats, name) for replica_stats in stats))

        pages = total("convolution_pages"), total("attention_pages")
        used = total("convolution_pages_used"), total("attention_pages_used")
        share = max((u / n for u, n in zip(used, pages, strict=True) if n), default=0.0)
        started = len(stats)
        gauges = {
            f"{self._prefix}:num_requests_running": (
                "Requests in prefill or decoding.",
                total("running"),
            ),
            f"{self._prefix}:num_requests_waiting": (
                "Requests whose prefill has not begun.",
                replicas.num_waiting,
            ),
            f"{self._prefix}:kv_cache_usage_perc": ("Fraction of the cache pages in use.", share),
            "stu:convolution_pages": ("Cache pages for convolutions.", pages[0]),
            "stu:convolution_pages_used": ("Cache pages for convolutions in use.", used[0]),
            "stu:attention_pages": ("Cache pages for attention windows.", pages[1]),
            "stu:attention_pages_used": ("Cache pages for attention windows in use.", used[1]),
            "stu:replicas_ready": ("Replicas that take requests.", started),
        }
        for name, (text, value) in gauges.items():
            yield self._metric(GaugeMetricFamily, name, text, value)
        counters = {
            f"{self._prefix}:num_preemptions": ("Requests preempted.", totals.preemptions),
            f"{self._prefix}:prefix_cache_queries": (
                "Prompt tokens that the prefix cache was asked for.",
                totals.prefix_tokens_asked,
            ),
            f"{self._prefix}:prefix_cache_hits": (
                "Prompt tokens that the prefix cache had.",
                totals.prefix_tokens_found,
            ),
            f"{self._prefix}:spec_decode_num_drafts": (
                "Steps that guessed tokens of a request, for each request.",
                totals.spec_decode_num_drafts,
            ),
            f"{self._prefix}:spec_decode_num_draft_tokens": (
                "Tokens that were guessed.",
                totals.spec_decode_num_draft_tokens,
            ),
            f"{self._prefix}:spec_decode_num_accepted_tokens": (
                "Guessed tokens that were right.",
                totals.spec_decode_num_accepted_tokens,
            ),
            "stu:replica_restarts": (
                "Replicas that ended and were replaced.",
                replicas.num_restarts,
            ),
            "stu:requests_resumed": (
                "Requests that continued in another replica.",
                replicas.num_resumed,
            ),
        }
        for name, (text, value) in counters.items():
            yield self._metric(CounterMetricFamily, name, text, value)

        caches = [own.convolution_cache for own in stats if own.convolution_cache]
        if caches:
            yield from self._convolution_cache(caches[0])  # replicas have the same

        flushes = (
            ("stu:flushes", "Engine steps that flushed tiles, by the size of the tile."),
            ("stu:flush_seconds", "Seconds that flushing tiles took, by the size of the tile."),
        )
        for column, (name, text) in enumerate(flushes):
            family = CounterMetricFamily(name, text, labels=["model_name", "tile_positions"])
            for positions, counts in sorted(totals.flushes.items()):
                family.add_metric([self._model_name, str(positions)], counts[column])
            yield family

    def _convolution_cache(self, cache: ConvolutionCacheInfo) -> Iterable[Metric]:
        info = GaugeMetricFamily(
            "stu:convolution_cache_info",
            "Always 1: the kind of the convolution cache, the rank of its states, or why it has "
            "no states.",
            labels=["model_name", "kind", "rank", "reason"],
        )
        info.add_metric([self._model_name, cache.kind, str(cache.rank), cache.reason], 1)
        yield info
        gauges = {
            "stu:convolution_cache_error": (
                "Largest error of a convolution's taps, relative to the largest of its filter.",
                cache.error,
            ),
            "stu:convolution_page_bytes": (
                "Bytes of a cache page for convolutions: with states, all of a sequence.",
                cache.page_bytes,
            ),
        }
        for name, (text, value) in gauges.items():
            yield self._metric(GaugeMetricFamily, name, text, value)

    def _metric(self, kind: Any, name: str, text: str, value: float) -> Metric:
        family: Metric = kind(name, text, labels=["model_name"])
        family.add_metric([self._model_name], value)  # type: ignore[attr-defined]
        return family
