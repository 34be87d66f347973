"""Rows of a batch decoded on this machine, by an engine on each device."""

from collections.abc import Collection, Generator

from serve.batch.config import BatchConfig
from serve.batch.decoder import Report
from serve.batch.job import BatchJob
from serve.batch.source import InputDigest
from serve.batch.worker import Work, decode
from serve.batch.workers import Workers
from serve.devices import device_groups, repeat_a_device
from stu.common.array_task import ArrayTask
from stu.common.errors import UserError
from stu.division.parts import check_divides_channels
from stu.model_dir import load_config


class LocalEngines:
    """Engines of this machine, and the rows for them.

    Raises UserError for a model, input or devices that cannot be used.
    """

    def __init__(self, config: BatchConfig, task: ArrayTask) -> None:
        self._config, self._task = config, task
        self._devices = _devices(config)
        self.job = BatchJob.of_files(config, InputDigest.of(config.input))
        self.decisive = self.job.model_and_settings()
        """Everything except the input that determines the rows."""

    def reports(self, done: Collection[int]) -> Generator[list[tuple[int, Report]], None, None]:
        """Decode the rows that are not in `done`, in this process or in several, and yield lists of
        reports, each with the number of its engine."""
        parts = self._task.split(len(self._devices))
        works = [
            Work(
                self._config,
                device,
                part,
                frozenset(number for number in done if number in part),
                self.job.digest,
                self.decisive,
            )
            for device, part in zip(self._devices, parts, strict=True)
        ]
        if len(works) == 1 and self._config.tensor_parallel == 1:
            yield from ([(0, report)] for report in decode(works[0]))
        else:
            with Workers(works) as workers:
                yield from workers.reports()

    def check_input(self) -> None:
        """Raise UserError if the input has changed."""
        self.job.digest.check(self._config.input)


def _devices(config: BatchConfig) -> list[str]:
    devices = device_groups(config.devices, config.tensor_parallel)
    check_divides_channels(load_config(config.model), config.tensor_parallel)
    if repeat_a_device(devices) and config.engine.cache_gib is None:
        raise UserError(
            "devices",
            message=f"--devices {config.devices} names a device twice, and each process would take "
            "half of its free memory; give --cache-gib",
        )
    return devices
