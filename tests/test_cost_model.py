"""What steps should take, from counted costs and three constants."""

import json

import pytest
import torch

from benchmarks import cli, convolution_costs, extrapolation, model
from benchmarks.rates import Rates, measured_rates, median_rates, of_gpu
from serve.pages import pages_for
from serve.tiles import TileFlush
from stu.config import ModelConfig
from stu.model import FlashSTU

RATES = Rates(bytes=1000.0, products=100.0, ffts=10.0)


def costs(**changed):
    adds = dict.fromkeys(["dense", "convolution", "fft", "attention", "recurrence"], 0.0)
    moved = dict.fromkeys(["weights", "filters", "cache_read", "cache_written"], 0.0)
    for name, value in changed.items():
        (adds if name in adds else moved)[name] = value
    return adds, moved


def seconds(batch, **changed):
    return sum(model.step_parts(*costs(**changed), batch, RATES).values())


def test_a_step_is_what_its_parts_take_at_these_rates():
    """Costs of a token, times of a step of the batch."""
    assert seconds(2, weights=3000.0) == pytest.approx(6.0)
    assert seconds(2, dense=500.0) == pytest.approx(10.0)
    assert seconds(4, filters=500.0, cache_read=200.0, cache_written=300.0) == pytest.approx(4.0)
    assert seconds(1, convolution=50.0, attention=30.0, recurrence=20.0) == pytest.approx(1.0)
    assert seconds(3, fft=20.0) == pytest.approx(6.0)
    everything = {"weights": 1e3, "dense": 1e2, "filters": 1e3, "convolution": 1e2, "fft": 1e1}
    assert seconds(1, **everything) == pytest.approx(5.0), "all of it adds up"


def test_rates_are_measured_and_of_several_the_middle_one_counts():
    rates = measured_rates()
    assert 1e8 < rates.bytes < 1e13
    assert rates.products > rates.ffts > 1e7
    several = [Rates(1.0, 6.0, 7.0), Rates(2.0, 5.0, 9.0), Rates(3.0, 4.0, 8.0)]
    assert median_rates(several) == Rates(2.0, 5.0, 8.0)


def test_a_gpu_s_rates_are_those_of_its_data_sheet():
    rates = of_gpu("h100-80g")
    assert rates.bytes == 3.35e12
    assert rates.products == pytest.approx(0.5 * 989e12 / 2)
    assert rates.ffts == pytest.approx(0.6 * 3.35e12 / 8 * 12)


def test_every_curve_has_its_error(tmp_path, capsys):
    file, picture = tmp_path / "decode.json", tmp_path / "model.png"
    settings = ["--width", "64", "--batch", "1", "2", "--new-tokens", "100", "200"]
    cli.main(["decode", *settings, "--caches", "paged", "naive", "--output", str(file)])
    capsys.readouterr()
    cli.main(["model", str(file), "--plot", str(picture)])
    result = json.loads(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [(its["cache"], its["batch"]) for its in result["curves"]] == [
        ("paged", 1),
        ("naive", 1),
        ("paged", 2),
        ("naive", 2),
    ]
    runs = json.loads(file.read_text())["runs"]
    for curve in result["curves"]:
        assert [its["new_tokens"] for its in curve["points"]] == [100, 200]
        for its in curve["points"]:
            assert its["error"] == pytest.approx(its["predicted_ms"] / its["measured_ms"] - 1)
            assert sum(its["predicted_shares"].values()) == pytest.approx(1)
            assert its["measured_ms"] in {run["step_ms"] for run in runs}
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
    monkeypatch.setattr(extrapolation.tile_levels, "CORE_BYTES", 0)
    none = [its.cores is not None for its in extrapolation.tiles(shape)._levels]
    assert not any(none)


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
    assert cells[64, 4096]["paged"]["cache_gib"] < cells[64, 4096]["naive"]["cache_gib"]
