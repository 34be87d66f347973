"""Rows through an engine: how far ahead they are read, and errors."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from serve.batch import decoder as decoder_module
from serve.batch.decoder import Decoder
from serve.batch.rows import Refusal, Row
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.prompts import RequestBuilder
from tests.serve.requests import make_request

NUM_ROWS = 10**6


ROW_FORMAT = SimpleNamespace(
    completed=lambda row, done: {"row": row.number, "texts": [part.text for part in done]},
    refused=lambda row: {"row": row.number, "error": row.error, "code": row.status_code},
)


def quarter_read():
    return SimpleNamespace(fraction_read=0.25, place=lambda number: f"place {number}")


@pytest.fixture
def engine(code_model, code_tokenizer):
    return Engine(code_model, code_tokenizer, EngineConfig(cache_gib=0.01, max_running=4))


@pytest.fixture
def build(code_tokenizer):
    builder = RequestBuilder(code_tokenizer, {"seed": 0, "max_new_tokens": 8})
    return lambda prompt="x", **settings: builder.build(0, prompt, settings)


def decode(engine, rows, **options):
    options = {"stride": 1, "max_waiting": 6, **options}
    yield from Decoder(engine, ROW_FORMAT, quarter_read(), **options).decode(iter(rows))


def written(reports):
    rows = [json.loads(line) for report in reports for line in report.lines]
    return {row.pop("row"): row for row in rows}


def test_rows_are_read_only_as_they_are_needed(engine, build):
    num_read = 0

    def rows():
        nonlocal num_read
        for number in range(NUM_ROWS):
            num_read += 1
            yield Row(number, number, {}, [build()])

    reports = decode(engine, rows())
    first = next(reports)
    assert len(first.lines) == 4
    assert num_read <= 4 + 6
    for _ in range(20):
        report = next(reports)
        assert report.stats.waiting <= 6
    assert num_read <= 4 * 21 + 4 + 6


def test_rows_left_are_estimated_from_the_fraction_read(engine, build):
    source = quarter_read()

    def every_third_row():
        for number in range(0, 300, 3):
            source.fraction_read = (number + 1) / 300
            yield Row(number, number, {}, [build()])

    decoder = Decoder(engine, ROW_FORMAT, source, stride=3, max_waiting=6)
    num_written = 0
    for report in decoder.decode(every_third_row()):
        num_written += len(report.lines)
        assert num_written + report.rows_left == pytest.approx(100, abs=1)
    assert (num_written, report.rows_left) == (100, 0)


def test_many_refused_rows_are_reported_in_parts(engine):
    rows = [Refusal(number, number, "bad") for number in range(10_000)]
    reports = list(decode(engine, rows))
    assert max(len(report.lines) for report in reports) == decoder_module.REPORT_ROWS
    assert sum(report.num_failed for report in reports) == len(written(reports)) == 10_000


def test_reports_come_at_intervals_without_finished_rows(engine, build, monkeypatch):
    monkeypatch.setattr(decoder_module, "REPORT_SECONDS", 0)
    reports = list(decode(engine, [Row(0, 0, {}, [build()])]))
    assert [len(report.lines) for report in reports] == [0] * (len(reports) - 1) + [1]
    assert [report.stats.new_tokens for report in reports][-3:] == [6, 7, 8]


def test_row_ends_with_its_last_request(engine, build):
    lengths = [3, 30, 1, 9]
    requests = [build(max_new_tokens=count, stop_at_eos=False) for count in lengths]
    rows = [Row(0, 0, {}, requests), Row(1, 1, {}, requests[:1])]
    reports = list(decode(engine, rows))
    ended = [list(rows) for report in reports if (rows := written([report]))]
    assert ended == [[1], [0]], "each row is reported when it ends"
    results = written(reports)
    assert len(results[0]["texts"]) == 4
    assert results[0]["texts"][:1] == results[1]["texts"]
    assert results[0]["texts"][1].startswith(results[0]["texts"][3])


def test_refused_request_refuses_its_row_only(engine, build):
    never = make_request([1, 9999], 5)
    rows = [
        Row(0, "a", {}, [build()]),
        Row(1, "b", {}, [build(), never, build()]),
        Row(2, "c", {}, [build()]),
    ]
    results = written(decode(engine, rows))
    assert results[1]["code"] == 400
    assert results[1]["error"].startswith(
        "place 1: prompt is not allowed: it has the id 9999, and the vocabulary ids 0 to 279"
    )
    assert results[0] == results[2] == written(decode(engine, rows[:1]))[0]
    assert engine.stats().convolution_pages_used == 0
    engine.check_integrity()


def test_failed_request_fails_its_row_only(engine, build, monkeypatch):
    poisoned = build("def", max_new_tokens=20)
    step = engine.step

    def step_and_fail():
        outputs = step()
        for at, output in enumerate(outputs):
            if output.request_id == 2 and output.finish_reason is None:
                engine.abort(2)
                outputs[at] = replace(output, finish_reason="error", error="not finite")
        return outputs

    monkeypatch.setattr(engine, "step", step_and_fail)
    rows = [
        Row(0, "a", {}, [build()]),
        Row(1, "b", {}, [build(max_new_tokens=40), poisoned, build()]),
        Row(2, "c", {}, [build()]),
    ]
    reports = list(decode(engine, rows))
    results = written(reports)
    assert results[1] == {"error": "place 1: not finite", "code": 500}
    assert results[0] == results[2]
    assert sum(report.num_failed for report in reports) == 1
    assert engine.stats().new_tokens < 40  # the other requests of its row were aborted
    engine.check_integrity()
