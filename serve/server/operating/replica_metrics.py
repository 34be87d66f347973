"""Prometheus metrics that replicas report."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.cache.base import ConvolutionCacheInfo
from serve.server.replicas.versions import Versions


@dataclass(frozen=True)
class _Sample:
    """A value of a model."""

    kind: Literal["gauge", "counter"]
    name: str
    text: str
    value: float
    labels: dict[str, str] = field(default_factory=dict)
    """Labels beside the name of the model."""


def _unlabelled(
    kind: Literal["gauge", "counter"], values: Mapping[str, tuple[str, float]]
) -> Iterator[_Sample]:
    """Yield samples without labels of texts and values by name."""
    for name, (text, value) in values.items():
        yield _Sample(kind, name, text, value)


class ReplicasCollector(Collector):
    """Metrics that the replicas of each model report, summed over them.

    prefix: Prefix of metrics that vLLM has too.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._models: dict[str, Versions] = {}

    def add(self, name: str, replicas: Versions) -> None:
        """Collect from the replicas of a model, too."""
        self._models[name] = replicas

    def collect(self) -> Iterable[Metric]:
        """Yield the current metrics."""
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for name, replicas in self._models.items():
            for sample in self._samples(replicas):
                if sample.name not in families:
                    kind = GaugeMetricFamily if sample.kind == "gauge" else CounterMetricFamily
                    labels = ["model_name", *sample.labels]
                    families[sample.name] = kind(sample.name, sample.text, labels=labels)
                labels = [name, *sample.labels.values()]
                families[sample.name].add_metric(labels, sample.value)
        yield from families.values()

    def _samples(self, replicas: Versions) -> Iterator[_Sample]:
        stats, totals = replicas.stats, replicas.totals()

        def total(name: str) -> float:
            return float(sum(getattr(replica_stats, name) for replica_stats in stats))

        pages = total("convolution_pages"), total("attention_pages")
        used = total("convolution_pages_used"), total("attention_pages_used")
        share = max((u / n for u, n in zip(used, pages, strict=True) if n), default=0.0)
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
            "stu:replicas": ("Replicas wanted.", len(replicas)),
            "stu:replicas_ready": (
                "Replicas of the current version that take requests.",
                len(replicas.current.stats),
            ),
        }
        yield from _unlabelled("gauge", gauges)
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
        yield from _unlabelled("counter", counters)
        caches = [own.convolution_cache for own in stats if own.convolution_cache]
        if caches:
            yield from _convolution_cache(caches[0])  # replicas have the same
        flushes = (
            ("stu:flushes", "Engine steps that flushed tiles, by the size of the tile."),
            ("stu:flush_seconds", "Seconds that flushing tiles took, by the size of the tile."),
        )
        for column, (name, text) in enumerate(flushes):
            for positions, counts in sorted(totals.flushes.items()):
                labels = {"tile_positions": str(positions)}
                yield _Sample("counter", name, text, counts[column], labels)


def _convolution_cache(cache: ConvolutionCacheInfo) -> Iterator[_Sample]:
    yield _Sample(
        "gauge",
        "stu:convolution_cache_info",
        "Always 1: the kind of the convolution cache, the rank of its states, or why it has no "
        "states.",
        1,
        {"kind": cache.kind, "rank": str(cache.rank), "reason": cache.reason},
    )
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
    yield from _unlabelled("gauge", gauges)
