"""Several engines that decode one batch, each in a child process."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import IO

from serve.batch.decoder import Report
from serve.batch.worker import Work
from stu.common.machine import num_processors
from stu.common.processes import child_command, hangups_blocked, last_output


class Workers:
    """A worker process for each of `works`, ended with the context."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = works
        self._processes: list[subprocess.Popen[bytes]] = []
        self._errors: list[IO[bytes]] = []
        self._threads: list[threading.Thread] = []
        self._reports: queue.SimpleQueue[tuple[int, Report | None]] = queue.SimpleQueue()

    def __enter__(self) -> "Workers":
        num_ranks = len(self._works) * self._works[0].config.tensor_parallel
        num_threads = max(1, num_processors() // num_ranks)
        environment = {"OMP_NUM_THREADS": str(num_threads), **os.environ}
        for index in range(len(self._works)):
            self._errors.append(tempfile.TemporaryFile())
            with hangups_blocked():
                self._processes.append(
                    subprocess.Popen(
                        child_command("serve.batch.worker"),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=self._errors[index],
                        env=environment,
                        # Ctrl-C ends this process alone, which ends the workers.
                        start_new_session=True,
                    )
                )
            self._threads.append(threading.Thread(target=self._serve, args=[index], daemon=True))
            self._threads[index].start()
        return self

    def reports(self) -> Iterator[list[tuple[int, Report]]]:
        """Yield lists of the reports that have arrived, each with the index of its worker.

        Raises OSError if a worker ends before its work is done, after its last report.
        """
        num_left = len(self._works)
        while num_left:
            arrived = [self._reports.get()]
            while not self._reports.empty():
                arrived.append(self._reports.get())
            if reports := [(index, report) for index, report in arrived if report is not None]:
                yield reports
            for index, report in arrived:
                if report is None:
                    num_left -= 1
                    self._require_done(index)

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for thread in self._threads:
            thread.join()
        for process, errors in zip(self._processes, self._errors, strict=True):
            with process, errors:
                pass  # closes the pipes

    def _serve(self, index: int) -> None:
        """Send a worker its work, and queue its reports, with None after the last."""
        process = self._processes[index]
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(self._works[index].to_json()).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: see its exit code
        for line in process.stdout:
            if line.endswith(b"\n"):  # else its death cut it off
                self._reports.put((index, Report.from_json(json.loads(line))))
        self._reports.put((index, None))

    def _require_done(self, index: int) -> None:
        code = self._processes[index].wait()
        tail = last_output(self._errors[index])
        if code == 0:
            if tail:
                print(f"the worker on {self._works[index].device}: {tail}", file=sys.stderr)
            return
        how = (
            f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        )
        raise OSError(
            f"the worker on {self._works[index].device} {how}; its last output: {tail or 'none'}"
        )
