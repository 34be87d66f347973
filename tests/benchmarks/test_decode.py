"""The decoding benchmark measures what it says: equal caches, every setting, all figures."""

import json
import statistics

import pytest
import torch

from benchmarks import plots
from benchmarks.__main__ import main
from benchmarks.decoding import decode, model, sampling
from benchmarks.decoding.caches import CACHES, OURS, Flush, cache_bytes, make_cache
from benchmarks.decoding.sampling import Sample, merged, sampled, summary
from benchmarks.decoding.shape import Shape
from benchmarks.decoding.subjects import CacheSubject
from stu.config import ModelConfig
from stu.model import FlashSTU

LAYOUTS = ["stu", "hybrid", "hyena"]


def make(layout="stu", prompt=7, new=100, batch=2, width=16):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=4096,
        width=width,
        layout=layout,
        num_layers=2,
        max_seq_len=prompt + new,
        num_filters=8,
    )
    return FlashSTU(config).eval(), Shape(config, batch, prompt, new)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_caches_give_the_outputs_of_a_causal_convolution(layout):
    """Decoded from the first position; tiles over prompt and generation read the prompt as well."""
    model, shape = make(layout)
    taps, lag_step = model.convolution_taps()
    inputs = torch.randn(107, len(taps), 2, 16)
    spread = torch.zeros(lag_step * taps.shape[1], len(taps), 16)
    spread[::lag_step] = taps.transpose(0, 1)
    for name in CACHES:
        cache = make_cache(name, model, shape)
        if name in OURS:
            cache.seek(96)  # to pages without a number in them
            continue
        for position in range(107 if name == "flashinference" else 100):
            for layer in range(len(taps)):
                output = cache.step(layer, inputs[position, layer])
                lags = spread[: position + 1, layer, None].flip(0)
                expected = (inputs[: position + 1, layer] * lags).sum(0)
                torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
            cache.advance()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CACHES)
def test_cache_bytes_are_what_is_allocated(layout, name):
    model, shape = make(layout, prompt=100, new=200, width=64)
    cache = make_cache(name, model, shape)
    cache.seek(1)
    held = cache.cache.num_bytes if name in OURS else cache.cache_bytes
    assert cache_bytes(name, model, shape) == held


def test_the_engine_cache_flushes_at_the_ends_that_it_names():
    """Also where a place is asked for twice, and all is decoded again."""
    model, shape = make("hyena", 30, 300, width=64)
    cache = make_cache("ours", model, shape)

    def num_flushes():
        return sum(count for count, _ in cache.cache.flushes.values())

    visits = sorted([end for flush in cache.flushes() for end in flush.positions] * 2)
    for end in visits:
        cache.seek(end - 1)
        before = num_flushes()
        for layer in range(cache.num_layers):
            cache.step(layer, torch.zeros(shape.batch, 64))
        cache.advance()
        assert num_flushes() - before == shape.batch


def test_flushes_that_occur_once_are_counted():
    model, shape = make("hyena", new=320, batch=1)
    samples = sampled(CacheSubject(model, "ours", shape), shape.new_tokens)
    flushes = [sample for sample in samples if sample.does]
    assert sorted(sample.weight for sample in flushes) == [1, 1, 2, 5]
    assert all(sample.counts["fft"] for sample in flushes)


def test_states_go_back_to_any_place_of_a_page():
    model, shape = make("stu", 30, 300, width=64)
    cache = make_cache("ours", model, shape)
    for position in (40, 33, 70, 65, 64, 31):
        cache.seek(position)
        assert cache.position == position
        assert cache.cache.page_ends()[0] == 32 - position % 32


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_can_be_set_to_later_positions(layout, name):
    model, shape = make(layout, 30, 100, width=64)
    subject = CacheSubject(model, name, shape)
    for position in (3, 31, 64, 95):
        subject.seek(position)
        figures = subject.step()
        assert 0 < figures["convolution"] < figures["step"]
    counts = subject.count()
    assert counts["dense"] > 0
    assert counts["convolution"] > 0


@pytest.mark.slow
def test_decode_reports_every_setting_and_ratio(capsys, quick_timing, tmp_path):
    settings = ["--layout", "[hybrid]", "--width", "64", "--layers", "2", "--new-tokens", "[320]"]
    settings += ["--batch", "[2]", "--caches", "[ours,ours_int8,flashinference]"]
    assert main(["decode", *settings, "--peers", "[s4]", "--rounds", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    runs = {run["cache"]: run for run in result["runs"]}
    assert list(runs) == ["ours", "ours_int8", "flashinference", "s4"]
    moved = [runs[name]["bytes_moved_per_token"]["weights"] for name in ("ours", "ours_int8")]
    assert moved[0] == 4 * moved[1]
    for cache, run in runs.items():
        assert run["tokens_per_second"] == pytest.approx(2000 / run["step_ms"])
        assert run["operations_per_step"] > 50
        assert 0 < model.point(run)["predicted_ms"] < 1e3 * run["step_ms"]
        for counts in (run["multiply_adds_per_token"], run["bytes_moved_per_token"]):
            assert counts["total"] == pytest.approx(sum(counts.values()) / 2)
        if cache != "ours":
            rounds = zip(run["step_ms_by_round"], runs["ours"]["step_ms_by_round"], strict=True)
            ratios = [own / ours for own, ours in rounds]
            assert run["step_over_ours_by_round"] == ratios
            assert run["step_over_ours"] == statistics.median(ratios)
        if cache != "s4":
            assert 0 < run["convolution_ms"] < run["step_ms"]
    parameters = runs["s4"]["parameters"] / runs["ours"]["parameters"]
    assert parameters == pytest.approx(1, abs=0.05)
    plots.draw_decode(result, tmp_path / "decode.png")
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_a_cache_that_does_not_fit_is_reported_and_not_run(monkeypatch):
    monkeypatch.setattr(sampling, "SHARE_OF_MEMORY", 0.0)
    options = decode.Options(width=64, new_tokens=(512,), batch=(64,), peers=("s4",))
    runs = decode.measure(options)["runs"]
    assert [run["cache"] for run in runs] == [*options.caches, "s4"]
    assert all(run["not_run"].startswith("does not fit: ") for run in runs)


@pytest.mark.parametrize(
    ("command", "refused"),
    [
        ("decode --rounds 0", "rounds"),
        ("decode --batch [8,-1]", "batch"),
        ("decode --new-tokens [319]", "new-tokens=319 is not allowed: it must be at least 320"),
        ("decode --caches [page]", 'caches="page" is not allowed'),
        ("decode --layout [attention]", "one with long convolutions"),
        ("decode --batches [1]", "--batches"),
        ("model --decode [{nothing}]", "nothing.json: no timed run; make it by python -m"),
        ("sizes", "no benchmark sizes"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(capsys, tmp_path, command, refused):
    nothing = tmp_path / "nothing.json"
    nothing.write_text('{"machine": {}, "runs": [{"not_run": "does not fit"}]}')
    try:
        code = main(command.format(nothing=nothing).split())
    except SystemExit as error:
        code = error.code
    assert code == 2
    output = capsys.readouterr()
    assert refused in output.err
    assert output.out == ""


class LinearSubject:
    """A subject whose steps take as many milliseconds as tokens were decoded."""

    def __init__(self):
        self.position, self.places = 0, []

    def step(self):
        self.places.append(self.position)
        self.position += 1
        return {"step": float(self.position - 1)}

    def count(self):
        return {"dense": self.step()["step"]}

    def seek(self, position):
        assert position >= self.position, "a cache may have to decode all tokens again"
        self.position = position

    def flushes(self):
        return [Flush("a flush", [4064, 4128], 64, 4192)] if self.position == 0 else []


@pytest.mark.parametrize("new_tokens", [5000, 8192])
def test_samples_estimate_the_mean_of_growing_steps(new_tokens):
    samples = sampled(LinearSubject(), new_tokens)
    assert sum(sample.weight for sample in samples) == pytest.approx(new_tokens)
    plain = [sample for sample in samples if not sample.does]
    assert summary(plain)["step_ms"] == pytest.approx(new_tokens / 2, rel=0.05)
    (flush,) = (sample for sample in samples if sample.does)
    assert (flush.weight, flush.figures, flush.counts) == (64, {"step": 4095.0}, {"dense": 4191.0})


def test_timed_steps_are_spread_over_pages_and_end_none(monkeypatch):
    subject = LinearSubject()
    subject.flushes = list
    sampled(subject, 2048)
    timed = [place for i, place in enumerate(subject.places) if i % 7]
    assert len(set(timed)) == len(timed) == 30
    for page in (32, 64):
        assert all((place + 1) % page for place in [*subject.places, subject.position])
        middle = sum(place % page for place in timed) / len(timed)
        assert middle == pytest.approx((page - 1) / 2, rel=0.1)


def test_a_run_counts_each_kind_of_step_as_often_as_it_occurs():
    plain, flush = {"step": 10.0, "convolution": 1.0}, {"step": 110.0, "convolution": 101.0}
    result = summary([Sample(95.0, plain), Sample(5.0, flush, "a flush")])
    assert result["step_ms"] == pytest.approx(15)
    assert result["convolution_share"] == pytest.approx(0.4)
    assert result["largest_step_ms"] == 110
    assert result["largest_step_does"] == "a flush"


def test_operations_are_counted_in_the_first_round_alone():
    subject = LinearSubject()
    subject.count = None  # must not be needed
    samples = sampled(subject, 8192, counts_too=False)
    assert all(sample.counts == {} for sample in samples)
    assert [sample.figures for sample in samples] == [
        sample.figures for sample in sampled(LinearSubject(), 8192)
    ]


def test_rounds_give_the_median_of_each_sample():
    several = [
        [Sample(9.0, {"step": ms, "convolution": 1 / ms}), Sample(1.0, {"step": 10 * ms}, "flush")]
        for ms in (4.0, 1.0, 2.0)
    ]
    first, second = merged(several)
    assert first.figures == {"step": 2.0, "convolution": 0.5}
    assert second == Sample(1.0, {"step": 20.0}, "flush")
    assert merged(several[:2])[0].figures == {"step": 2.5, "convolution": 0.625}


def test_flushes_of_every_size_are_timed_in_mid_run():
    """Tiles of one page are flushed after 1, 3, .. 31 pages, 16 times; the largest only once."""
    flushes = make_cache("continuous", *make(new=1024, batch=1)).flushes()
    sizes = [64 * 2**i for i in range(len(flushes))]
    assert [flush.does for flush in flushes] == [f"a flush of {size} positions" for size in sizes]
    assert [flush.count for flush in flushes] == [512 // size for size in sizes]
    for size, flush in zip(sizes, flushes, strict=True):
        assert flush.positions[0] % (2 * size) == size
        assert abs(flush.positions[0] - 512) <= size


def test_no_timed_flush_is_the_first_of_its_size(monkeypatch):
    """The first one transforms the filters."""
    cache = make_cache("continuous", *make(new=600, batch=1))
    cache.seek(10)
    rfft, lengths = torch.fft.rfft, []
    monkeypatch.setattr(
        torch.fft, "rfft", lambda x, **k: lengths.append(x.shape[-1]) or rfft(x, **k)
    )
    for flush in cache.flushes():
        lengths.clear()
        cache.seek(flush.positions[0] - 1)
        cache.advance()
        assert len(lengths) == 1
