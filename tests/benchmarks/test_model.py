"""The cost model: counts of operations, speeds of a machine, and the times that follow."""

import json
from dataclasses import asdict

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.decoding import rates
from benchmarks.decoding.caches import CACHES
from benchmarks.decoding.counting import counted, report
from benchmarks.decoding.model import Options, measure
from benchmarks.decoding.rates import (
    Meter,
    Rates,
    mean_rates,
    median_rates,
    operations,
    step_parts,
)
from benchmarks.decoding.shape import Shape
from benchmarks.decoding.subjects import CacheSubject
from stu.config import ModelConfig
from stu.model import FlashSTU

RATES = Rates(
    bytes=1000.0,
    products=100.0,
    single_products=20.0,
    ffts=10.0,
    streams=5.0,
    operations=4.0,
    stream_bytes=500.0,
)


def make_run(batch, streams=0.0, stream_bytes=0.0, shared=0.0, num_operations=0, **changed):
    names = ["dense", "convolution", "fft", "attention", "recurrence"]
    adds = dict.fromkeys(names, 0.0)
    moved = dict.fromkeys(["weights", "filters", "cache_read", "cache_written"], 0.0)
    for name, value in changed.items():
        (adds if name in adds else moved)[name] = value
    return {
        "batch": batch,
        "multiply_adds_per_token": adds,
        "bytes_moved_per_token": moved,
        "streams_per_token": streams,
        "stream_bytes_per_token": stream_bytes,
        "shared_products_per_token": shared,
        "operations_per_step": num_operations,
    }


def parts(batch, **counts):
    return step_parts(make_run(batch, **counts), RATES)


def seconds(batch, **changed):
    return sum(parts(batch, **changed).values())


def test_a_step_takes_the_sum_of_its_parts():
    """Counts are per token, times per step of the batch."""
    assert seconds(2, weights=3000.0) == pytest.approx(6.0)
    assert seconds(2, dense=500.0) == pytest.approx(10.0)
    assert seconds(4, filters=500.0, cache_read=200.0, cache_written=300.0) == pytest.approx(4.0)
    assert seconds(1, convolution=50.0, attention=16.0, recurrence=20.0) == pytest.approx(1.5)
    assert seconds(2, attention=60.0, shared=40.0) == pytest.approx(2.0)
    assert seconds(2, streams=10.0) == pytest.approx(4.0)
    assert seconds(2, cache_read=700.0, stream_bytes=500.0) == pytest.approx(2.4)
    assert seconds(3, fft=20.0) == pytest.approx(6.0)
    assert seconds(3, num_operations=20) == pytest.approx(5.0), "of the whole batch"
    everything = {"weights": 1e3, "dense": 3e2, "filters": 1e3, "convolution": 1e2, "fft": 1e1}
    assert seconds(1, **everything) == pytest.approx(5.0), "what hides behind something is left out"
    for dense, products in ((100.0, 0.0), (700.0, 4.0)):
        step = parts(1, weights=3000.0, dense=dense)
        assert (step["weights"], step["products"]) == pytest.approx((3.0, products))


def test_rates_are_counts_by_time(quick_timing, monkeypatch):
    """Each call takes a second."""
    monkeypatch.setattr(rates, "timed", lambda call: float(call() is not None))
    measured = Meter(3).rates()
    assert measured.bytes == 2 * 4 * 2**22
    assert measured.products == 3 * (1 + 3 * 4) * 1024**2 / 4, "a block has four products"
    assert measured.single_products == 128 * 256 * 128
    assert measured.ffts == 2 * 64 * 4096 * 12, "there and back"
    streams = 2**22 // (3 * 4416) * 4
    assert measured.streams == streams, "three sequences' and a filter"
    assert measured.stream_bytes == 4 * 4096 * streams
    assert 5 <= measured.operations <= 30, "of a norm"


def test_rates_are_measured_and_averaged(quick_timing):
    measured = Meter(8).rates()
    assert 1e8 < measured.bytes < 1e13
    for multiply_adds in (measured.products, measured.single_products, measured.ffts):
        assert 1e7 < multiply_adds < 1e14
    assert 1e5 < measured.streams < 1e9
    assert 1e8 < measured.stream_bytes < 1e13
    assert 1e3 < measured.operations < 1e7
    several = [Rates(*(n * scale for n in range(1, 8))) for scale in (1.0, 3.0, 9.0)]
    assert median_rates(several) == several[1]
    assert mean_rates(several[:2]) == Rates(*(1.5 * n for n in range(1, 8))), "1 / 1 + 1 / 3"


def test_only_innermost_operations_are_counted():
    x = torch.randn(4, 4)
    assert operations(lambda: x.add(x).mul(x)) == 2
    assert operations(lambda: None) == 0
    assert operations(lambda: x @ x) == operations(lambda: x.mm(x)), "which is in it"


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
    expected |= {"streams": 1, "stream_bytes": 4 * keys.numel()}
    numbers = {kinds[0]: 4 * 2 * 9 * 3}
    numbers[kinds[1]] = numbers.get(kinds[1], 0) + state.numel()
    assert {name: count for name, count in counts.items() if count} == expected | numbers
    figures = report(counts, 2, 1000)
    assert figures["multiply_adds_per_token"]["dense"] == 35
    assert figures["bytes_moved_per_token"]["weights"] == 500
    assert figures["streams_per_token"] == 0.5


def test_operations_into_scratch_memory_count_as_without():
    states, turns = torch.randn(3, 4, 5), torch.randn(3, 5, 6)
    scratch, row, index = torch.empty(3, 4, 6), torch.empty(2, 4, 5), torch.tensor([2, 0])

    def step(out):
        product = torch.bmm(states, turns, out=scratch if out else None)
        return product * 2, torch.index_select(states, 0, index, out=row if out else None)

    into, without = (counted(lambda out=out: step(out), lambda: True) for out in (True, False))
    assert into == without
    assert into["convolution"] == 3 * 4 * 6 * 5


@pytest.mark.parametrize("group", [1, 4])
def test_queries_of_a_group_share_the_keys_that_they_read(group):
    queries, keys = torch.ones(2, 3, group, 8), torch.ones(2, 3, 50, 8)
    counts = counted(lambda: scaled_dot_product_attention(queries, keys, keys), lambda: False)
    assert counts["attention"] == 2 * 2 * 3 * group * 8 * 50
    assert counts["attention"] - counts["shared"] == 2 * keys.numel()


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
    slots = [(position + offset) % 32 // 2 for offset in (0, 16)]
    assert slots == [3, 11], "which end groups of four"
    outputs = {
        "ours": sum(1 + 4 * (16 - slot - 1) for slot in slots) / 2,
        "continuous": 32 - column % 32,
        "flashinference": 32 - (prompt + position) // 2 % 32,
        "epoched": 34 - column % 34,
        "naive": prompt // 2 + column + 1,
    }
    convolution = layers * width * batch * outputs[name.removesuffix("_int8")]
    assert counts["convolution"] == pytest.approx(convolution, rel=0.1)
    numbers = counts["cache_read"] / 4
    assert numbers > convolution / (1 if name != "naive" else 1.1)
    streams = layers * width * (batch + 1)
    assert counts["streams"] == (streams if name == "naive" else 0)
    assert (counts["stream_bytes"] > 0) == (name == "naive")


def test_a_curve_has_the_largest_error_of_its_points(tmp_path):
    """Predicted are 1 and 2 s a step."""
    head = {"layout": "stu", "mlp_ratio": 4, "threads": 1, "rates": asdict(RATES)}
    runs = [
        head | {"cache": cache, "new_tokens": tokens, "step_ms": step_ms}
        for cache, steps in {"ours": (800.0, 1250.0), "naive": (1000.0, 1000.0)}.items()
        for tokens, step_ms in zip((320, 330), steps, strict=True)
    ]
    runs = [run | make_run(batch, weights=1000.0) for batch in (1, 2) for run in runs]
    runs.append({"not_run": "does not fit"})
    files = tmp_path / "decode.json", tmp_path / "layouts.json"
    for file in files:
        file.write_text(json.dumps({"machine": {}, "runs": runs}))
    result = measure(Options(decode=files))
    errors = {
        (curve["result"], curve["batch"], curve["cache"]): [p["error"] for p in curve["points"]]
        for curve in result["curves"]
    }
    for name in ("decode", "layouts"):  # the same setting stays apart by result
        assert errors.pop((name, 1, "ours")) == pytest.approx([0.25, -0.2])
        assert errors.pop((name, 2, "ours")) == pytest.approx([1.5, 0.6])
        assert errors.pop((name, 1, "naive")) == pytest.approx([0, 0])
        assert errors.pop((name, 2, "naive")) == pytest.approx([1, 1])
    assert not errors
    assert [curve["largest_error"] for curve in result["curves"]] == pytest.approx(
        [0.25, 0, 1.5, 1] * 2
    )
    assert result["largest_error"] == pytest.approx({"ours": 1.5, "naive": 1})
    (first, second) = result["curves"][0]["points"]
    assert (first["new_tokens"], second["new_tokens"]) == (320, 330)
    assert (first["measured_ms"], first["predicted_ms"]) == pytest.approx((800, 1000))
    assert first["predicted_shares"]["weights"] == pytest.approx(1)


def test_writing_a_few_places_of_a_cache_moves_what_is_written():
    cache, new, places = torch.zeros(50, 4, 8), torch.ones(2, 4, 8), torch.tensor([3, 40])
    columns = torch.arange(8)

    def step():
        made = new + 1
        cache[places] = made
        cache.index_copy_(0, places, made)
        cache[0, :, columns] = new[0]

    counts = counted(step, lambda: False)
    assert counts["cache_written"] == 4 * (2 * 64 + 32), "not all of the cache"
    assert counts["cache_read"] == 4 * (64 + 32), "the numbers of `new`, once in the sum"
    assert counts["recurrence"] == 64, "the sum alone"
