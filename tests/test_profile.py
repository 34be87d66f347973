"""What convolutions spend their time on, counted once and named rightly."""

import json
from collections import Counter

import pytest
import torch
from torch import profiler

from benchmarks import cli, profile


def test_a_profile_counts_each_moment_of_a_convolution_once(capsys, quick_timing):
    settings = ["--width", "64", "--layers", "2", "--new-tokens", "100", "--prompt-tokens", "9"]
    cli.main(["profile", *settings, "--batch", "2", "--caches", "paged", "epoched"])
    result = json.loads(capsys.readouterr().out)
    assert [run["cache"] for run in result["runs"]] == ["paged", "epoched"]
    for run in result["runs"]:
        assert list(run["parts_ms"]) == list(result["parts"])
        assert sum(run["parts_ms"].values()) == pytest.approx(run["profiled_ms"])
        assert 0 < run["of_flushes_ms"] < run["convolution_ms"]
        for part in ("sums", "copies", "others", "python"):
            assert run["parts_ms"][part] > 0
        predicted = run["operations_per_step"] / run["rates"]["operations"]
        assert run["predicted_ms"]["operations"] == pytest.approx(1e3 * predicted)
        assert run["operations_per_step"] > 5
    paged, epoched = (run["parts_ms"] for run in result["runs"])
    assert paged["products"] > 0 == paged["ffts"], "of factors"
    assert epoched["ffts"] > 0 == epoched["products"]


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda x: x @ x, "products"),
        (lambda x: torch.fft.irfft(torch.fft.rfft(x)), "ffts"),
        (lambda x: x.mul(x).sum(0), "sums"),
        (lambda x: x.t().contiguous(), "copies"),
        (lambda x: x.double(), "copies"),
        (lambda x: x[3:].view(-1), "others"),
    ],
)
def test_parts_of_a_profile(call, part):
    x = torch.randn(64, 64)
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as profiled:
        call(x)
    spent = Counter()
    for event in profiled.events():
        spent[profile.part_of(event)] += event.self_cpu_time_total
    assert set(spent) <= {part, "others"}
    assert spent[part] > 0
