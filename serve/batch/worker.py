"""One engine and its part of a batch: in this process, or as a process of its own.

    python -m serve.batch.worker

takes its work as a line of JSON on stdin, and gives its reports as lines of JSON on stdout. It ends
when its stdin does, so that it does not outlive the run that it works for, however that one ends.
"""

import gc
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from serve.batch.config import BatchConfig
from serve.batch.decoder import NO_STATS, READING_ERRORS, Decoder, Report
from serve.batch.job import BatchJob
from serve.batch.rows import read_rows
from serve.batch.source import InputDigest
from serve.engine.engine import Engine
from stu.common.array_task import ArrayTask
from stu.common.cli import run_command
from stu.model_dir import load_model


@dataclass(frozen=True)
class Work:
    """What one engine is to decode."""

    config: BatchConfig
    device: str
    """torch's name of it."""
    task: ArrayTask
    done: frozenset[int]
    """Numbers of the rows of `task` that need no decoding."""
    digest: InputDigest
    """Digest that the input must still have."""
    model_and_settings: Mapping[str, Any]
    """`BatchJob.model_and_settings` as the run began with it."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "config": self.config.to_json(),
            "device": self.device,
            "task": str(self.task),
            "done": sorted(self.done),
            "digest": self.digest.to_json(),
            "model_and_settings": self.model_and_settings,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Work":
        """From what `to_json` gave."""
        return cls(
            BatchConfig.from_json(values["config"]),
            values["device"],
            ArrayTask.parse(values["task"]),
            frozenset(values["done"]),
            InputDigest.from_json(values["digest"]),
            values["model_and_settings"],
        )


def decode(work: Work) -> Iterator[Report]:
    """Decode all rows of `work`, reporting now and then; the model is loaded if there are any.

    An input that cannot be read any further is told by the last report. Raises ValueError or
    OSError for what keeps all rows from being decoded.
    """
    job = BatchJob(work.config, work.digest)
    rows = read_rows(
        job.source,
        job.row_format,
        lambda number: number in work.task and number not in work.done,
    )
    try:
        first = next(rows, None)
    except READING_ERRORS as error:
        yield Report([], 0, 0, 0, NO_STATS, reading_error=str(error))
        return
    if first is None:
        return
    try:
        dtype = getattr(torch, work.config.dtype)
        # The engine keeps what it needs of the model, which nobody else holds.
        engine = Engine(
            load_model(work.config.model, work.device, dtype), job.tokenizer, work.config.engine
        )
        # Afterwards, or one that is exported now might be loaded in part.
        job.require_same(work.model_and_settings)
        # Or a step now and then would wait for a collection of all that was ever imported.
        gc.collect()
        gc.freeze()
        most_waiting = 2 * work.config.engine.max_running
        decoder = Decoder(engine, job.row_format, job.source, work.task.count, most_waiting)
        yield from decoder.decode(chain([first], rows))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{work.device} is out of memory: lower cache_gib, max_running or "
            "prompt_tokens_per_step, or choose another device"
        ) from error


def main() -> int:
    """The worker process. 0: all is reported; 2: an error, which stderr says."""

    def report_all() -> int:
        work = Work.from_json(json.loads(sys.stdin.buffer.readline()))
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        # What a library prints must not come between the reports.
        with os.fdopen(os.dup(1), "w", encoding="utf-8") as reports:
            os.dup2(2, 1)
            for report in decode(work):
                print(json.dumps(report.to_json()), file=reports, flush=True)
        return 0

    return run_command("stu-generate worker", report_all, "serve")


def _end_with_stdin() -> None:
    # sys.stdin would be locked by this thread when the process ends.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
