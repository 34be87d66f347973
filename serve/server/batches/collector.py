"""Prometheus metrics of batches."""

from collections import Counter
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.server.batches.batches import Batches


class BatchCollector(Collector):
    """Metrics of batches.

    model_name: Label of batches, and of rows whose model is not known.
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
        models = self._batches.limits.rows_at_once
        counts = Counter({(model, is_error): 0 for model in models for is_error in (False, True)})
        for (model, is_error), count in self._batches.num_results.items():
            counts[model or self._model_name, is_error] += count
        for (model, is_error), count in counts.items():
            rows.add_metric([model, "failed" if is_error else "completed"], count)
        yield from (unfinished, rows)
