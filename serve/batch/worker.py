"""One engine that decodes its part of a batch, in this process or in a child process.

    python -m serve.batch.worker

reads its work as a line of JSON from stdin and writes its reports as lines of JSON to stdout. It
ends when stdin does, so that it never outlives the run that started it.
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
from serve.devices import is_out_of_memory
from serve.parallel.loading import make_engine
from stu.common.array_task import ArrayTask
from stu.common.cli import run_command
from stu.common.errors import UserError


@dataclass(frozen=True)
class Work:
    """Rows for one engine to decode."""

    config: BatchConfig
    device: str
    """torch's name of the device, or names with commas between them, which divide the model."""
    task: ArrayTask
    """Rows of this engine."""
    done: frozenset[int]
    """Numbers of the rows of `task` that are written already."""
    digest: InputDigest
    """Digest that the input must still have."""
    model_and_settings: Mapping[str, Any]
    """`BatchJob.model_and_settings` when the run began."""

    def to_json(self) -> dict[str, Any]:
        """Return the work as JSON values."""
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
        """Return the work that `to_json` wrote."""
        return cls(
            BatchConfig.from_json(values["config"]),
            values["device"],
            ArrayTask.parse(values["task"]),
            frozenset(values["done"]),
            InputDigest.from_json(values["digest"]),
            values["model_and_settings"],
        )


def decode(work: Work) -> Iterator[Report]:
    """Decode all rows of `work` and yield reports. The model is loaded only if there are rows.

    The last report says why the rest of the input cannot be read, if so. Raises UserError or
    OSError if nothing can be decoded.
    """
    job = BatchJob.of_files(work.config, work.digest)
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
        dtype, config = getattr(torch, work.config.dtype), work.config.engine
        engine = make_engine(work.config.model, work.device, dtype, job.tokenizer, config)
        # After loading, since an export may have replaced the model meanwhile.
        job.require_same(work.model_and_settings)
        # Objects of the imports need no garbage collection, which would delay a step at times.
        gc.collect()
        gc.freeze()
        max_waiting = 2 * work.config.engine.max_running
        decoder = Decoder(engine, job.row_format, job.source, work.task.count, max_waiting)
        yield from decoder.decode(chain([first], rows))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "devices",
            message=f"{work.device} is out of memory; lower --cache-gib, --max-running or "
            "--prompt-tokens-per-step, or choose another device",
        ) from error


def main() -> int:
    """Run a worker process. Returns 0 when everything is reported, 2 after an error, which is on
    stderr."""

    def report_all() -> int:
        work = Work.from_json(json.loads(sys.stdin.buffer.readline()))
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        # Output of libraries must not come between the reports.
        with os.fdopen(os.dup(1), "w", encoding="utf-8") as reports:
            os.dup2(2, 1)
            for report in decode(work):
                print(json.dumps(report.to_json()), file=reports, flush=True)
        return 0

    return run_command("stu-generate worker", report_all, "serve", BatchConfig)


def _end_with_stdin() -> None:
    # os.read, since this thread would hold the lock of sys.stdin when the process ends.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
