"""What steps should take, from counted costs and a few constants."""

import json
from dataclasses import replace

import pytest
import torch

import benchmarks.rates
from benchmarks import cli, convolution_costs, extrapolation
from benchmarks.operations import operations
from benchmarks.rates import Rates, mean_rates, measured_rates, of_gpu, step_parts
from serve.cache.page_pool import PagePool, pages_for
from serve.cache.paged_futurefill import ConvolutionCache
from serve.cache.tiles import TileFlush
from stu.config import ModelConfig
from stu.model import FlashSTU
from train.flops import num_parameters

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


def test_a_step_is_what_its_parts_take_at_these_rates():
    """Costs of a token, times of a step of the batch."""
    assert seconds(2, weights=3000.0) == pytest.approx(6.0)
    assert seconds(2, dense=500.0) == pytest.approx(10.0)
    assert seconds(4, filters=500.0, cache_read=200.0, cache_written=300.0) == pytest.approx(4.0)
    assert seconds(1, convolution=50.0, attention=16.0, recurrence=20.0) == pytest.approx(1.5)
    assert seconds(2, streams=10.0) == pytest.approx(4.0)
    assert seconds(3, fft=20.0) == pytest.approx(6.0)
    assert seconds(3, num_operations=20) == pytest.approx(5.0), "of the whole batch"
    everything = {"weights": 1e3, "dense": 3e2, "filters": 1e3, "convolution": 1e2, "fft": 1e1}
    assert seconds(1, **everything) == pytest.approx(5.0), "but what hides behind something"


def test_reading_weights_hides_products_or_they_it():
    for dense, products in ((100.0, 0.0), (700.0, 4.0)):
        its = parts(1, weights=3000.0, dense=dense, fft=10.0)
        assert its["weights"] == pytest.approx(3.0)
        assert its["products"] == pytest.approx(products)
        assert its["ffts"] == pytest.approx(1.0)


def test_rates_are_counts_by_time(monkeypatch):
    """Each call takes a second."""
    monkeypatch.setattr(benchmarks.rates, "timed", lambda call: 1.0 if call() is not None else 0.0)
    rates = measured_rates(3)
    assert rates.bytes == 2 * 4 * 2**26
    assert rates.products == 3 * 4 * (1 + 3 * 4) * 1024**2, "of four blocks"
    assert rates.single_products == 128 * 4096 * 128
    assert rates.ffts == 2 * 64 * 4096 * 12, "there and back"
    assert rates.streams == 2**26 // (3 * 4096) * 4, "three sequences' and a filter"
    assert 5 <= rates.operations <= 30, "of a norm"


def test_rates_are_measured_and_of_several_the_mean_counts():
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


def test_a_gpu_s_rates_are_those_of_its_data_sheet():
    rates = of_gpu("h100-80g")
    assert rates.bytes == 3.35e12
    assert rates.products == rates.single_products == pytest.approx(0.5 * 989e12 / 2)
    assert rates.ffts == pytest.approx(0.6 * 3.35e12 / 8 * 12)


def test_every_curve_has_its_error(tmp_path, capsys, monkeypatch, quick_timing):
    file, picture = tmp_path / "decode.json", tmp_path / "model.png"
    settings = ["--width", "64", "--layers", "2", "--batch", "1", "2", "--new-tokens", "100", "200"]
    settings += ["--rounds", "1", "--caches", "paged", "naive"]
    cli.main(["decode", *settings, "--output", str(file)])
    capsys.readouterr()
    monkeypatch.setattr(extrapolation, "LENGTHS", [64, 512])
    other = tmp_path / "layouts.json"
    other.write_text(file.read_text())
    cli.main(["model", str(file), str(other), "--plot", str(picture)])
    result = json.loads(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [(its["result"], its["cache"], its["batch"]) for its in result["curves"]] == [
        (name, cache, batch)
        for name in ("decode", "layouts")
        for batch in (1, 2)
        for cache in ("paged", "naive")
    ], "those of one setting stay apart by result"
    measured = json.loads(file.read_text())
    runs = {(run["cache"], run["batch"], run["new_tokens"]): run for run in measured["runs"]}
    for curve in result["curves"]:
        assert [its["new_tokens"] for its in curve["points"]] == [100, 200]
        for its in curve["points"]:
            assert its["error"] == pytest.approx(its["predicted_ms"] / its["measured_ms"] - 1)
            assert sum(its["predicted_shares"].values()) == pytest.approx(1)
            run = runs[curve["cache"], curve["batch"], its["new_tokens"]]
            assert its["measured_ms"] == run["step_ms"]
            assert its["rates"] == run["rates"]
            assert run["operations_per_step"] > 30
            predicted = sum(step_parts(run, Rates(**run["rates"])).values())
            assert its["predicted_ms"] == pytest.approx(1e3 * predicted)
        assert curve["largest_error"] == max(abs(its["error"]) for its in curve["points"])
    for cache, error in result["largest_error"].items():
        its = [curve["largest_error"] for curve in result["curves"] if curve["cache"] == cache]
        assert error == max(its)


def test_factors_of_few_channels_cost_what_those_of_many_do():
    prompt, new, width, layers = 100, 2000, 192, 2
    config = ModelConfig(
        vocab_size=1, width=width, num_layers=layers, layout="stu", max_seq_len=prompt + new
    )
    taps, lag_step = FlashSTU(config).convolution_taps()
    real = TileFlush(taps, lag_step, torch.zeros(1, layers, 32, width), pages_for(new - 1, 32))
    shape = convolution_costs.Shape(layers, width, lag_step, taps.shape[1], 4, prompt, new, 32)
    expected = convolution_costs.paged(shape, real).costs(shape)
    found = convolution_costs.paged(shape, extrapolation.tiles(shape)).costs(shape)
    for name in expected.__dataclass_fields__:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=0.03), name


def test_cores_that_there_is_no_room_for_are_computed_again(monkeypatch):
    shape = convolution_costs.Shape(2, 192, 2, 1050, 4, 100, 2000, 32)
    kept = [its.cores is not None for its in extrapolation.tiles(shape)._levels]
    assert all(kept)
    _, rank_out, rank_in = extrapolation.tiles(shape)._levels[0].basis_cores.shape
    monkeypatch.setattr(
        extrapolation.tile_levels, "CORE_BYTES", 2 * 192 * 4 * rank_out * rank_in + 1
    )
    kept = [its.cores is not None for its in extrapolation.tiles(shape)._levels]
    assert kept[0]
    assert not any(kept[1:])


def test_gains_grow_with_length_and_batch_and_short_runs_gain_nothing():
    rates = of_gpu("h100-80g")
    config = ModelConfig(
        vocab_size=200064, width=1024, num_layers=4, num_heads=8, mlp_ratio=12, max_seq_len=8192
    )
    cells = {
        (batch, new): extrapolation.cell(config, batch, new, rates)
        for batch in (1, 64)
        for new in (512, 4096)
    }
    times = {key: its["times_as_fast"] for key, its in cells.items()}
    assert times[1, 512] == pytest.approx(1, abs=0.05)
    assert cells[1, 512]["paged"]["dense_share"] > 0.9
    assert times[64, 4096] > times[64, 512] > times[1, 512]
    assert times[64, 4096] > times[1, 4096]
    assert cells[64, 4096]["paged"]["fits"]


def test_a_cell_is_what_can_be_counted_by_hand(monkeypatch):
    """Direct sums of a model without attention, at batch 2: 100 prompt tokens, 4 new ones."""
    monkeypatch.setattr(extrapolation, "PROMPT_TOKENS", 100)
    config = ModelConfig(
        vocab_size=1000, width=64, num_layers=3, layout="stu", mlp_ratio=4, max_seq_len=8192
    )
    rates = Rates(
        bytes=1e6, products=1e6, single_products=1e6, ffts=1e6, streams=1e5, operations=1.0
    )
    its = extrapolation.cell(config, 2, 4, rates)["naive"]
    parameters = num_parameters(replace(config, max_seq_len=104))
    taps = (51 + 51 + 52 + 52) / 4  # even lags back to the first token, on average
    channels = 3 * 64
    products = 2 * (3 * 13 * 64 * 64 + 1000 * 64) / 1e6
    latest = (1 + 1 + 2 + 2) / 4
    read, written = taps + latest + 1, latest + 2
    caches = channels * (4 * taps + 2 * 2 * (read + written)) / 1e6  # taps float32, inputs half
    dense = max(2 * parameters / 1e6, products)
    sums = 2 * channels * taps / 1e6
    assert caches > sums, "which hide behind them"
    begun = channels * 3 / 1e5  # inputs of two, and filters
    assert its["step_ms"] == pytest.approx(1e3 * (dense + caches + begun))
    assert its["dense_share"] == pytest.approx(dense / (dense + caches + begun))
    assert its["cache_gib"] * 2**30 == 2 * 2 * channels * (50 + 2 + 16) * 2


def test_what_does_not_fit_beside_the_weights_is_told(monkeypatch):
    config = ModelConfig(
        vocab_size=1000, width=64, num_layers=3, layout="stu", mlp_ratio=4, max_seq_len=8192
    )
    rates = of_gpu("h100-80g")
    weights = 2 * num_parameters(replace(config, max_seq_len=1024))
    filters = 4 * 3 * 64 * 512
    held = extrapolation.cell(config, 2, 512, rates)["naive"]["cache_gib"] * 2**30
    for spare, fits in ((1.01, True), (0.99, False)):
        gpu = replace(
            extrapolation.GPUS["h100-80g"],
            memory_gib=spare * (weights + filters + held) / 2**30 / extrapolation.USABLE_SHARE,
        )
        monkeypatch.setitem(extrapolation.GPUS, "h100-80g", gpu)
        assert extrapolation.cell(config, 2, 512, rates)["naive"]["fits"] == fits


@pytest.mark.parametrize("pages", [3, 16, 33])
def test_flushes_read_and_write_what_is_counted(pages, monkeypatch):
    """Of the pages themselves, by looking at what is taken out of them and put in."""
    shape = convolution_costs.Shape(1, 8, 2, 600, 1, 1, pages * 32, 32)
    config = ModelConfig(vocab_size=1, width=8, num_layers=1, layout="stu", max_seq_len=1200)
    taps, lag_step = FlashSTU(config).convolution_taps()
    pool = PagePool(pages + 3, (1, 32, 8))
    cache = ConvolutionCache(taps, lag_step, pool, max_rows=1)
    cache.admit(0, 0, pages * 32)
    cache.prefill(0, 0, torch.randn(1, 1, 8))
    cache.join(0)
    watched = Watched(cache._tiles._pages)
    cache._tiles._pages = watched
    add, memory = torch.Tensor.baddbmm_, pool.pages.untyped_storage().data_ptr()

    def added(its, *factors):
        is_page = its.untyped_storage().data_ptr() == memory
        watched.written += its.numel() if is_page else 0
        return add(its, *factors)

    monkeypatch.setattr(torch.Tensor, "baddbmm_", added)
    for _ in range(pages * 32 - 1):
        cache.step(0, torch.randn(1, 8))
        cache.advance()
    within = convolution_costs._within_pages(shape, 16, 0, 2)
    counts = convolution_costs.paged(shape, cache._tiles)
    read, written = (
        8 * (getattr(counts, name) - getattr(within, name)) for name in ("read", "written")
    )
    assert watched.read == pytest.approx(read, rel=0.1)
    assert watched.written == pytest.approx(written, rel=0.1)


class Watched:
    """Pages that count what is read from them and written to them."""

    def __init__(self, pages):
        self._pages, self.read, self.written = pages, 0, 0
        self.shape, self.dtype = pages.shape, pages.dtype

    def __getitem__(self, place):
        its = self._pages[place]
        self.read += its.numel()
        return its

    def __setitem__(self, place, value):
        self._pages[place] = value
        self.written += value.numel()
