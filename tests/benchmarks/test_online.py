"""One convolution by each method: the same outputs, all figures, and the counts of whole runs."""

import json
import math

import pytest
import torch

from benchmarks import online_tables, plots
from benchmarks.__main__ import main
from benchmarks.decoding.online import ConvolutionSubject, methods
from benchmarks.decoding.shape import Shape
from stu.config import ModelConfig
from stu.model import FlashSTU

LENGTH, WIDTH = 330, 4


def make():
    torch.manual_seed(0)
    config = ModelConfig(8, WIDTH, 1, "stu", num_heads=1, num_filters=8, max_seq_len=LENGTH)
    model = FlashSTU(config).eval()
    return model, methods(model, Shape(config, 1, 1, LENGTH), (64, 100))


@torch.inference_mode()
def test_epochs_of_any_length_decode_the_same_convolution():
    model, several = make()
    taps, lag_step = model.convolution_taps()
    inputs = torch.randn(LENGTH - 1, 1, WIDTH)
    spread = torch.zeros(lag_step * taps.shape[1], WIDTH)
    spread[::lag_step] = taps[0]
    expected = torch.stack(
        [(inputs[: t + 1, 0] * spread[: t + 1].flip(0)).sum(0) for t in range(LENGTH - 1)]
    )
    names = [(method.cache, method.epoch) for method in several]
    assert names[0] == ("naive", None)
    assert [name for name, _ in names[-3:]] == ["continuous", "pages", "state"]
    paper = 2 * math.ceil(math.sqrt(165 * math.log2(165)))
    assert names[1:-3] == [("epoched", epoch) for epoch in (paper, 64, 100, LENGTH)]
    for method in several[:-2]:  # tests/serve compares the engine's caches
        cache = method.begin()
        if method.epoch is not None:
            assert method.epoch == lag_step * cache.page_columns
        outputs = []
        for token in inputs:
            outputs.append(cache.step(0, token).clone())
            cache.advance()
        found = torch.stack(outputs)[:, 0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=str(method))


def test_pages_are_decoded_again_where_an_earlier_step_is_wanted():
    """So that flushes which occur once are both timed and counted."""
    _, several = make()
    subject = ConvolutionSubject(several[-2].begin, WIDTH)
    subject.seek(255)
    plain = subject.count()
    assert plain["fft"] > 0, "the largest tile is flushed after 256 tokens"
    subject.seek(255)
    assert subject.count() == plain
    subject.seek(260)
    assert subject.count()["fft"] == 0


def test_a_result_has_all_figures_and_is_shown(capsys):
    options = ["--lengths", "[330,600]", "--epochs", "[128]", "--width", "8", "--rounds", "1"]
    assert main(["online", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    caches = [*online_tables.LABELS, "epoched", "epoched"]
    for length in (330, 600):
        runs = [run for run in result["runs"] if run["new_tokens"] == length]
        assert sorted(run["cache"] for run in runs) == sorted(caches)
    for run in result["runs"]:
        assert 0 < run["step_ms"] <= run["largest_step_ms"]
        assert run["cache_bytes"] > 0
        if run["cache"] == "naive":  # half of the past on average, and even lags alone
            expected = 8 * run["new_tokens"] / 4
            assert run["multiply_adds_per_token"] == pytest.approx(expected, rel=0.1)
    counts = {
        run["cache"]: run["multiply_adds_per_token"] for run in online_tables.lines(result)[1::2]
    }
    assert counts["state"] < counts["continuous"] < counts["epoched"] < counts["naive"]
    shown = online_tables.online(result).splitlines()[2:]
    assert len(shown) == len(online_tables.LABELS) + 1
    paper = next(run for run in online_tables.epochs(result, 600) if run["is_paper_epoch"])
    best = min(online_tables.epochs(result, 600), key=lambda run: run["step_ms"])
    assert f" | {1e3 * paper['step_ms']:,.0f} | " in shown[1]
    assert f"fastest epoch: {best['epoch']:,} | {1e3 * best['step_ms']:,.0f} | " in shown[2]


@pytest.mark.slow
def test_pictures_are_drawn_from_the_recorded_results(tmp_path):
    plots.draw_pictures(tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"decode.png", "futurefill.png", "quality.png", "training-step.png"}
    assert min(sizes.values()) > 1e4


def test_lengths_that_cannot_be_sampled_are_refused(capsys):
    with pytest.raises(SystemExit) as raised:
        raise SystemExit(main(["online", "--lengths", "[300]"]))
    assert raised.value.code == 2
    assert "lengths=300 is not allowed: it must be at least 320" in capsys.readouterr().err
