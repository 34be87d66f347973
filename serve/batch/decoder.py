"""Rows through an engine: a few wait there, each is reported when its last request has ended."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from serve.batch.rows import Refusal, Row, RowFormat
from serve.batch.source import Source
from serve.completion import Gathering
from serve.engine.engine import Engine
from serve.engine.stats import Stats
from serve.request import Output
from stu.common.text import json_line

REPORT_SECONDS = 0.5
REPORT_ROWS = 256
"""At most, but for those that end together: a million refused rows are not to pile up."""
READING_ERRORS = (ValueError, OSError)
"""Raised by an input that is damaged, has changed, or whose disk fails."""
NO_STATS = Stats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Report:
    """What an engine has done since the last report."""

    lines: list[str]
    """The rows that ended, as JSON."""
    num_failed: int
    """Of these, the ones with an error."""
    rows_left: float
    """Rows under way, and an estimate of those that have not been read."""
    seconds: float
    """Since decoding began."""
    stats: Stats
    reading_error: str = ""
    """Why the rest of the input cannot be read, in the last report."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Report":
        """From what `to_json` gave."""
        return cls(**{**values, "stats": Stats.from_json(values["stats"])})


class Decoder:
    """Decodes rows with `engine`.

    source: where the rows are read from. stride: one row in so many of it is to be decoded.
    most_waiting: requests that wait in the engine's queue, but for those of one row; the rows after
    them are not read yet.
    """

    def __init__(
        self, engine: Engine, row_format: RowFormat, source: Source, stride: int, most_waiting: int
    ) -> None:
        self._engine, self._format, self._source = engine, row_format, source
        self._stride, self._most_waiting = stride, most_waiting
        self._under_way: dict[int, _UnderWay] = {}
        """By the number of the row."""
        self._answers: dict[int, _Answer] = {}
        """By the id of the request."""
        self._lines: list[str] = []
        self._num_failed = 0
        self._unread = 0.0
        self._reading_error = ""
        self._start = 0.0

    def decode(self, rows: Iterator[Row | Refusal]) -> Iterator[Report]:
        """Decode all rows: a report after each step in which some ended, and every half a second.

        Rows end in any order. Where the input cannot be read any further, those before are decoded,
        and the last report says why.
        """
        self._start = reported = time.monotonic()
        are_more = True
        while are_more or self._engine.has_work:
            while are_more and self._has_room():
                are_more = self._begin_next(rows)
            for output in self._engine.step() if self._engine.has_work else []:
                self._take(output)
            if self._lines or time.monotonic() - reported >= REPORT_SECONDS:
                yield self._report()
                reported = time.monotonic()
        if self._reading_error:
            yield self._report()

    def _has_room(self) -> bool:
        is_full = self._engine.stats().waiting >= self._most_waiting
        return not is_full and len(self._lines) < REPORT_ROWS

    def _begin_next(self, rows: Iterator[Row | Refusal]) -> bool:
        """Whether there was another row."""
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
            self._begin(row)
        return True

    def _begin(self, row: Row) -> None:
        """Queue a row's requests, or refuse it for one that can never be decoded."""
        under_way = self._under_way[row.number] = _UnderWay(row, len(row.requests))
        try:
            for request in row.requests:
                request_id = self._engine.add(request)
                under_way.request_ids.append(request_id)
                self._answers[request_id] = _Answer(row_number=row.number)
        except ValueError as error:
            self._give_up(under_way, str(error), 400, getattr(error, "code", None))

    def _take(self, output: Output) -> None:
        answer = self._answers.get(output.request_id)
        if answer is None:
            return  # of a row that was given up
        answer.add(output)
        if output.finish_reason is None:
            return
        under_way = self._under_way[answer.row_number]
        if output.finish_reason == "error":
            status_code = 400 if output.is_refused else 500
            self._give_up(under_way, output.error, status_code=status_code)
            return
        under_way.num_unfinished -= 1
        if under_way.num_unfinished == 0:
            completions = [its.completion() for its in self._end(under_way)]
            self._write(self._format.completed(under_way.row, completions))

    def _give_up(
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
    """A row whose requests have not all ended."""

    row: Row
    num_unfinished: int
    request_ids: list[int] = field(default_factory=list)


@dataclass
class _Answer(Gathering):
    """What has come of a request of a row."""

    row_number: int = 0
