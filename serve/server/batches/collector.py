"""Prometheus metrics of batches."""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.server.batches.batches import Batches


class BatchCollector(Collector):
    """Metrics of batches.

    model_name: Label of all metrics.
    """

    def __init__(self, batches: Batches, model_name: str) -> None:
        self._batches, self._model_name = batches, model_name

    def collect(self) -> Iterable[Metric]:
        """Yield the current metrics."""
        unfinished = GaugeMetricFamily(
            "stu:batches_unfinished", "Batches that have not ended.", labels=["model_name"]
        )
        unfinished.add_metric([self._model_name], self._batches.num_unfinished)
        rows = CounterMetricFamily(
            "stu:batch_rows", "Rows of batches with a result.", labels=["model_name", "result"]
        )
        for result, is_error in (("completed", False), ("failed", True)):
            rows.add_metric([self._model_name, result], self._batches.num_results[is_error])
        yield from (unfinished, rows)
