"""Rows of a batch decoded over the hosts of a Ray cluster.

Ray Data gives the rows in blocks to actors, each with an engine in a process of its own, and gives
the block of an actor that was killed to another one. Only the run that started them writes the
output, and a row that it has is not written again.
"""

import asyncio
import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import ray

from serve.batch.cluster_input import ClusterInput
from serve.batch.config import BatchConfig
from serve.batch.decoder import NO_STATS, Report
from serve.batch.job import BatchJob
from serve.batch.rows import Refusal, Row
from serve.batch.source import InputDigest
from serve.completion import Completion, CompletionBuilder
from serve.devices import choose_devices
from serve.engine.stats import Stats
from serve.ray.cluster import connect, engine_resources
from serve.request import Request, check_request
from serve.server.replicas.dispatch import Replicas
from serve.server.replicas.stream import EngineError
from serve.server.replicas.supervisor import ReplicasConfig
from stu.common.array_task import ArrayTask
from stu.common.errors import UserError
from stu.common.text import json_line
from stu.model_dir import load_config

BLOCKS_AT_ONCE = 3
"""Blocks that an engine decodes together, so that it need not wait for the last row of one."""
UNBOUNDED = 2**31
"""Requests that may wait in an actor, which has no more than Ray gives it."""


class _FirstRow:
    """The first row of an input, which tells the format of all."""

    fraction_read, num_read = 0.0, 0

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        if self._fields:
            yield 0, self._fields

    def place(self, number: int) -> str:
        """See `Source.place`."""
        return f"row {number}"


class ClusterEngines:
    """Engines on the hosts of a cluster; see `serve.batch.engines.Engines`."""

    def __init__(self, config: BatchConfig, task: ArrayTask) -> None:
        connect()
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        ray.data.DataContext.get_current().enable_progress_bars = False
        self._config, self._task = config, task
        self._resources = engine_resources(
            config.engines, config.cpus_per_engine or 1, config.engine.cache_gib
        )
        self._input = ClusterInput(config)
        self._first = self._input.first_fields()
        self.job = BatchJob(config, self._input.digest, _FirstRow(self._first))
        self.decisive = self.job.model_and_settings()

    def reports(self, done: Collection[int]) -> Generator[list[tuple[int, Report]], None, None]:
        """See `Engines.reports`."""
        written = set(done)
        numbers: dict[str, int] = defaultdict(itertools.count(1).__next__)
        num_rows = self._input.count(self._task)
        while len(written) < num_rows:
            before = len(written)
            for block in self._decoded(written):
                # Ray may decode a block again whose rows have come already.
                is_new = [number not in written for number in block["number"]]
                written.update(block["number"].tolist())
                lines = [str(line) for line in block["line"][is_new]]
                num_failed = int(block["is_failed"][is_new].sum())
                left = num_rows - len(written)
                # The last row of a block has the newest state of its engine.
                seconds, stats = json.loads(block["state"][-1])
                report = Report(lines, num_failed, 0, seconds, Stats.from_json(stats))
                rows_left = Report([], 0, left, seconds, NO_STATS)  # of the run, not of an engine
                yield [(0, rows_left), (numbers[block["engine"][-1]], report)]
            if len(written) == before:
                raise OSError(f"Ray returned none of the {num_rows - before:,} rows that are left")

    def check_input(self) -> None:
        """Do nothing: each block was compared before it was used."""

    def _decoded(self, done: Collection[int]) -> Iterator[dict[str, Any]]:
        """Yield the rows that are not in `done`, in the blocks in which they were decoded."""
        resources = self._resources
        dataset = self._input.dataset(self._task, done).map_batches(
            RowDecoder,
            fn_constructor_args=(self._config.to_json(), dict(self.decisive), dict(self._first)),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=resources.count,
                max_concurrent_calls_per_actor=BLOCKS_AT_ONCE,
                max_tasks_in_flight_per_actor=2 * BLOCKS_AT_ONCE,
            ),
            **resources.options(),
        )
        try:
            yield from dataset.iter_batches(batch_size=None, batch_format="numpy")
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, UserError):
                raise UserError(cause.field, message=str(cause)) from error
            raise OSError(f"Ray could not decode the rows: {error}") from error


class RowDecoder:
    """An actor that decodes blocks of rows.

    Args:
        config: `BatchConfig.to_json`.
        decisive: `BatchJob.model_and_settings` when the run began.
        first: Fields of the first row of the input.

    Raises UserError if the model is another one on this host.
    """

    def __init__(
        self, config: dict[str, Any], decisive: Mapping[str, Any], first: Mapping[str, Any]
    ) -> None:
        self._config = BatchConfig.from_json(config)
        self._job = BatchJob(self._config, InputDigest({}), _FirstRow(first))
        self._job.require_same(decisive)
        self._model = load_config(self._config.model)
        self._replicas: Replicas | None = None
        self._starting = asyncio.Lock()
        self._began = 0.0
        self._id = ray.get_runtime_context().get_actor_id()

    async def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        """Return the output rows of a block of input rows."""
        replicas = await self._started()
        columns = [block[name] for name in ("number", "place", "fields", "error")]
        written = await asyncio.gather(
            *[self._written(replicas, *row) for row in zip(*columns, strict=True)]
        )
        stats = replicas.stats[0] if replicas.stats else NO_STATS
        seconds = asyncio.get_running_loop().time() - self._began
        return {
            "number": block["number"],
            "line": np.array([line for line, _ in written], object),
            "is_failed": np.array([is_failed for _, is_failed in written]),
            "engine": np.array([self._id] * len(written), object),
            "state": np.array([json.dumps([seconds, asdict(stats)])] * len(written), object),
        }

    async def _started(self) -> Replicas:
        async with self._starting:
            if self._replicas is None:
                config = self._config
                self._replicas = Replicas(
                    ReplicasConfig(
                        config.model,
                        tuple(choose_devices("auto")),
                        config.cpus_per_engine or 1,
                        config.dtype,
                        config.engine,
                        max_waiting=UNBOUNDED,
                    )
                )
                await self._replicas.start()
                await self._replicas.ready(lambda: True)
                self._began = asyncio.get_running_loop().time()
        return self._replicas

    async def _written(
        self, replicas: Replicas, number: int, place: str, fields: str, error: str
    ) -> tuple[str, bool]:
        """Return the output row of an input row, and whether it has an error."""
        row_format, number = self._job.row_format, int(number)
        row_id: str | int | None = None
        try:
            if error:
                raise UserError("input", message=error)
            values = json.loads(fields)
            row_id = row_format.id_of(values, number)
            row = row_format.row(number, row_id, values)
            completions = await self._completions(replicas, row)
        except (UserError, EngineError) as problem:
            status, code = (400, problem.code) if isinstance(problem, UserError) else (500, None)
            refusal = Refusal(number, row_id, f"{place}: {problem}", status, code)
            return json_line(row_format.refused(refusal)), True
        return json_line(row_format.completed(row, completions)), False

    async def _completions(self, replicas: Replicas, row: Row) -> list[Completion]:
        for request in row.requests:
            check_request(request, self._model)
        tasks = [asyncio.ensure_future(_completion(replicas, own)) for own in row.requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()


async def _completion(replicas: Replicas, request: Request) -> Completion:
    (stream,) = replicas.submit([request])
    builder = CompletionBuilder()
    async for output in replicas.outputs(stream):
        if output.finish_reason == "error":
            if output.is_refused:
                raise UserError("prompt", message=output.error)
            raise EngineError(output.error)
        builder.add(output)
    return builder.completion()
