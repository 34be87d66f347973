"""The cost model: counts of operations, speeds of a machine, and the times that follow."""

import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.decoding.caches import CACHES
from benchmarks.decoding.counting import counted, report
from benchmarks.decoding.model import Options, measure
from benchmarks.decoding.rates import (
    Rates,
    mean_rates,
    measured_rates,
    operations,
    rates_of_gpu,
    step_parts,
)
from benchmarks.decoding.shape import Shape
from benchmarks.decoding.subjects import CacheSubject
from stu.config import ModelConfig
from stu.model import FlashSTU

RATES = Rates(
    bytes=1000.0, products=100.0, single_products=20.0, ffts=10.0, streams=5.0, operations=4.0
)


def parts(batch, streams=0.0, num_operations=0, **changed):
    names = ["dense", "convolution", "fft", "attention", "recurrence"]
    adds = dict.fromkeys(names, 0.0)
    moved = dict.fromkeys(["weights", "filters", "cache_read", "cache_written"], 0.0)
    for name, value in changed.items():
        (adds if name in adds else moved)[name] = value
    run = {
        "batch": batch,
        "multiply_adds_per_token": adds,
        "bytes_moved_per_token": moved,
        "streams_per_token": streams,
        "operations_per_step": num_operations,
    }
    return step_parts(run, RATES)


def seconds(batch, **changed):
    return sum(parts(batch, **changed).values())


def test_a_step_takes_the_sum_of_its_parts():
    """Counts are those of a token, times those of a step of the batch."""
    assert seconds(2, weights=3000.0) == pytest.approx(6.0)
    assert seconds(2, dense=500.0) == pytest.approx(10.0)
    assert seconds(4, filters=500.0, cache_read=200.0, cache_written=300.0) == pytest.approx(4.0)
    assert seconds(1, convolution=50.0, attention=16.0, recurrence=20.0) == pytest.approx(1.5)
    assert seconds(2, streams=10.0) == pytest.approx(4.0)
    assert seconds(3, fft=20.0) == pytest.approx(6.0)
    assert seconds(3, num_operations=20) == pytest.approx(5.0), "of the whole batch"
    everything = {"weights": 1e3, "dense": 3e2, "filters": 1e3, "convolution": 1e2, "fft": 1e1}
    assert seconds(1, **everything) == pytest.approx(5.0), "what hides behind something is left out"
    for dense, products in ((100.0, 0.0), (700.0, 4.0)):
        step = parts(1, weights=3000.0, dense=dense)
        assert (step["weights"], step["products"]) == pytest.approx((3.0, products))


def test_rates_are_counts_by_time(monkeypatch):
    """Each call takes a second."""
    for module in ("timing", "decoding.rates"):
        monkeypatch.setattr(f"benchmarks.{module}.timed", lambda call: float(call() is not None))
    rates = measured_rates(3)
    assert rates.bytes == 2 * 4 * 2**26
    assert rates.products == 3 * 4 * (1 + 3 * 4) * 1024**2, "of four blocks"
    assert rates.single_products == 128 * 4096 * 128
    assert rates.ffts == 2 * 64 * 4096 * 12, "there and back"
    assert rates.streams == 2**26 // (3 * 4096) * 4, "three sequences' and a filter"
    assert 5 <= rates.operations <= 30, "of a norm"


def test_rates_are_measured_and_averaged(quick_timing):
    rates = measured_rates(8)
    assert 1e8 < rates.bytes < 1e13
    for multiply_adds in (rates.products, rates.single_products, rates.ffts):
        assert 1e7 < multiply_adds < 1e14
    assert 1e5 < rates.streams < 1e9
    assert 1e3 < rates.operations < 1e7
    several = [Rates(1.0, 6.0, 7.0, 2.0, 9.0, 8.0), Rates(2.0, 5.0, 9.0, 4.0, 1.0, 2.0)]
    assert mean_rates(several) == Rates(1.5, 5.5, 8.0, 3.0, 5.0, 5.0)


def test_operations_are_those_without_others_inside():
    x = torch.randn(4, 4)
    assert operations(lambda: x.add(x).mul(x)) == 2
    assert operations(lambda: None) == 0
    assert operations(lambda: x @ x) == operations(lambda: x.mm(x)), "which is in it"


def test_a_gpu_has_the_rates_of_its_data_sheet():
    rates = rates_of_gpu("h100-80g")
    assert rates.bytes == 3.35e12
    assert rates.products == rates.single_products == pytest.approx(0.5 * 989e12 / 2)
    assert rates.ffts == pytest.approx(0.6 * 3.35e12 / 8 * 12)


@pytest.mark.parametrize("in_convolution", [False, True])
def test_operations_are_counted_by_kind(in_convolution):
    weights, keys = torch.randn(7, 5), torch.randn(4, 3, 9)
    cache, state = torch.zeros(6, 8), torch.randn(1000, 1000)

    def step():
        x = torch.ones(2, 7) @ weights  # made in the step, and small
        scores = torch.bmm(torch.ones(4, 2, 3), keys)
        cache[:, :5].copy_(x[0])
        state.mul_(0.5)
        return torch.fft.rfft(torch.ones(3, 16)), scores + 1

    counts = counted(step, lambda: in_convolution)
    kinds = ("convolution", "convolution") if in_convolution else ("attention", "recurrence")
    expected = {"dense": 2 * 7 * 5, "fft": 3 * 16 * 4}
    expected["cache_read"] = 4 * keys.numel() + 4 * state.numel()
    expected["cache_written"] = 4 * 30 + 4 * state.numel()
    expected["streams"] = 1
    numbers = {kinds[0]: 4 * 2 * 9 * 3}
    numbers[kinds[1]] = numbers.get(kinds[1], 0) + state.numel()
    assert {name: count for name, count in counts.items() if count} == expected | numbers
    figures = report(counts, 2, 1000)
    assert figures["multiply_adds_per_token"]["dense"] == 35
    assert figures["bytes_moved_per_token"]["weights"] == 500
    assert figures["streams_per_token"] == 0.5


@pytest.mark.parametrize("name", CACHES)
def test_a_step_counts_what_the_algorithm_does(name):
    """A model of STU alone at batch 8, in the middle of a page: formulas of `FutureFill`."""
    layers, width, batch, prompt, position = 2, 64, 8, 100, 70
    config = ModelConfig(
        vocab_size=300, width=width, num_layers=layers, layout="stu", max_seq_len=400
    )
    torch.manual_seed(0)
    subject = CacheSubject(FlashSTU(config).eval(), name, Shape(config, batch, prompt, 300))
    subject.seek(position)
    counts = subject.count()
    dense = layers * (width**2 + 3 * 4 * width**2) + 300 * width
    assert counts["dense"] == batch * dense
    column = position // 2
    outputs = {
        "paged": 16 - column % 16,
        "continuous": 32 - column % 32,
        "flashinference": 32 - (prompt + position) // 2 % 32,
        "epoched": 34 - column % 34,
        "naive": prompt // 2 + column + 1,
    }
    convolution = layers * width * batch * outputs[name]
    assert counts["convolution"] == pytest.approx(convolution, rel=0.1)
    numbers = counts["cache_read"] / 4
    assert numbers > convolution / (1 if name != "naive" else 1.1)
    streams = layers * width * (batch + 1)
    assert counts["streams"] == (streams if name == "naive" else 0)


def test_every_curve_has_its_error(tmp_path, capsys, quick_timing):
    file = tmp_path / "decode.json"
    settings = ["--width", "64", "--layers", "2", "--batch", "[1,2]", "--new-tokens", "[320,330]"]
    settings += ["--rounds", "1", "--caches", "[paged,naive]"]
    assert main(["decode", *settings]) == 0
    file.write_text(capsys.readouterr().out)
    other = tmp_path / "layouts.json"
    other.write_text(file.read_text())
    result = measure(Options(decode=(file, other)))
    assert [(curve["result"], curve["cache"], curve["batch"]) for curve in result["curves"]] == [
        (name, cache, batch)
        for name in ("decode", "layouts")
        for batch in (1, 2)
        for cache in ("paged", "naive")
    ], "those of one setting stay apart by result"
    measured = json.loads(file.read_text())
    runs = {(run["cache"], run["batch"], run["new_tokens"]): run for run in measured["runs"]}
    for curve in result["curves"]:
        assert [point["new_tokens"] for point in curve["points"]] == [320, 330]
        for point in curve["points"]:
            run = runs[curve["cache"], curve["batch"], point["new_tokens"]]
            assert point["measured_ms"] == run["step_ms"]
            assert point["error"] == pytest.approx(point["predicted_ms"] / run["step_ms"] - 1)
            assert sum(point["predicted_shares"].values()) == pytest.approx(1)
            predicted = sum(step_parts(run, Rates(**run["rates"])).values())
            assert point["predicted_ms"] == pytest.approx(1e3 * predicted)
        assert curve["largest_error"] == max(abs(point["error"]) for point in curve["points"])
    for cache, error in result["largest_error"].items():
        curves = [curve for curve in result["curves"] if curve["cache"] == cache]
        assert error == max(curve["largest_error"] for curve in curves)
