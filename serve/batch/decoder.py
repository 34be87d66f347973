"""Rows decoded by one engine, and reports of those that have ended."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from serve.batch.rows import Refusal, Row, RowFormat
from serve.batch.source import Source
from serve.completion import CompletionBuilder
from serve.engine.engine import Engine
from serve.engine.stats import Stats
from serve.request import Output
from stu.common.errors import UserError
from stu.common.text import json_line

REPORT_SECONDS = 0.5
REPORT_ROWS = 256
"""Rows after which a report is due: refused rows take no time, and must not pile up."""
READING_ERRORS = (UserError, OSError)
"""Errors of an input that is damaged, has changed, or whose disk fails."""
NO_STATS = Stats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Report:
    """Rows that an engine has decoded since its last report, and its state."""

    lines: list[str]
    """Output rows, as JSON."""
    num_failed: int
    """Rows in `lines` that have an error."""
    rows_left: float
    """Rows being decoded, and an estimate of those not yet read."""
    seconds: float
    """Seconds since decoding began."""
    stats: Stats
    reading_error: str = ""
    """Reason why the rest of the input cannot be read; in the last report."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Report":
        """Return the report that `to_json` wrote."""
        return cls(**{**values, "stats": Stats.from_json(values["stats"])})


class Decoder:
    """Decodes rows with `engine`.

    stride: Number of rows of `source` of which this engine decodes one. max_waiting: Number of
    requests waiting in the engine at which no further row is read.
    """

    def __init__(
        self, engine: Engine, row_format: RowFormat, source: Source, stride: int, max_waiting: int
    ) -> None:
        self._engine, self._format, self._source = engine, row_format, source
        self._stride, self._max_waiting = stride, max_waiting
        self._under_way: dict[int, _UnderWay] = {}
        """Rows being decoded, by number."""
        self._answers: dict[int, _Answer] = {}
        """Outputs so far, by request id."""
        self._lines: list[str] = []
        self._num_failed = 0
        self._unread = 0.0
        self._reading_error = ""
        self._start = 0.0

    def decode(self, rows: Iterator[Row | Refusal]) -> Iterator[Report]:
        """Decode all rows, and yield a report after each step in which some end, and at least every
        half second.

        Rows end in any order. If the input cannot be read to its end, the rows before are decoded,
        and the last report says why.
        """
        self._start = reported = time.monotonic()
        are_more = True
        while are_more or self._engine.has_work:
            while are_more and self._has_room():
                are_more = self._start_next(rows)
            for output in self._engine.step() if self._engine.has_work else []:
                self._add(output)
            if self._lines or time.monotonic() - reported >= REPORT_SECONDS:
                yield self._report()
                reported = time.monotonic()
        if self._reading_error:
            yield self._report()

    def _has_room(self) -> bool:
        is_full = self._engine.stats().waiting >= self._max_waiting
        return not is_full and len(self._lines) < REPORT_ROWS

    def _start_next(self, rows: Iterator[Row | Refusal]) -> bool:
        """Read a row and start it; return whether there was one."""
        try:
            row = next(rows, None)
        except READING_ERRORS as error:
            row, self._reading_error = None, str(error)
        if row is None:
            self._unread = 0
            return False
        read = self._source.fraction_read
        self._unread = (row.number + 1) * (1 - read) / read / self._stride
        if isinstance(row, Refusal):
            self._refuse(row)
        else:
            self._start_row(row)
        return True

    def _start_row(self, row: Row) -> None:
        """Queue a row's requests, or refuse the row if one of them can never be decoded."""
        under_way = self._under_way[row.number] = _UnderWay(row, len(row.requests))
        try:
            for request in row.requests:
                request_id = self._engine.add(request)
                under_way.request_ids.append(request_id)
                self._answers[request_id] = _Answer(row_number=row.number)
        except UserError as error:
            self._fail(under_way, str(error), 400, getattr(error, "code", None))

    def _add(self, output: Output) -> None:
        answer = self._answers.get(output.request_id)
        if answer is None:
            return  # its row was refused meanwhile
        answer.add(output)
        if output.finish_reason is None:
            return
        under_way = self._under_way[answer.row_number]
        if output.finish_reason == "error":
            status_code = 400 if output.is_refused else 500
            self._fail(under_way, output.error, status_code=status_code)
            return
        under_way.num_unfinished -= 1
        if under_way.num_unfinished == 0:
            completions = [answer.completion() for answer in self._end(under_way)]
            self._write(self._format.completed(under_way.row, completions))

    def _fail(
        self, under_way: "_UnderWay", error: str, status_code: int, code: str | None = None
    ) -> None:
        self._end(under_way)
        for request_id in under_way.request_ids:
            self._engine.abort(request_id)
        row = under_way.row
        place = self._source.place(row.number)
        self._refuse(Refusal(row.number, row.id, f"{place}: {error}", status_code, code))

    def _end(self, under_way: "_UnderWay") -> list["_Answer"]:
        del self._under_way[under_way.row.number]
        return [self._answers.pop(request_id) for request_id in under_way.request_ids]

    def _refuse(self, refusal: Refusal) -> None:
        self._num_failed += 1
        self._write(self._format.refused(refusal))

    def _write(self, written: dict[str, Any]) -> None:
        self._lines.append(json_line(written))

    def _report(self) -> Report:
        rows_left = len(self._under_way) + self._unread
        seconds, stats = time.monotonic() - self._start, self._engine.stats()
        error = "" if self._under_way else self._reading_error
        report = Report(self._lines, self._num_failed, rows_left, seconds, stats, error)
        self._lines, self._num_failed = [], 0
        return report


@dataclass
class _UnderWay:
    """A row with requests that have not ended."""

    row: Row
    num_unfinished: int
    request_ids: list[int] = field(default_factory=list)


@dataclass
class _Answer(CompletionBuilder):
    """Outputs of a request so far."""

    row_number: int = 0
