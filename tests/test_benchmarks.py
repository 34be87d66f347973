"""The benchmarks measure what they say: same tokens from every cache, all figures there."""

import argparse
import importlib
import json
import re
from datetime import datetime

import pytest
import torch

from benchmarks import cli, decode, invariance, rounds, soak
from benchmarks.decode_engine import cache_flushes, make_engine
from benchmarks.decode_subjects import EngineSubject
from benchmarks.energy import joules_counter
from benchmarks.lockstep_cache import LockstepCache
from benchmarks.machine import commit, describe
from benchmarks.peak_memory import peak_gib
from benchmarks.samples import Sample, mean_watts, merged, sampled, summary
from stu.config import ModelConfig
from stu.futurefill import Continuous
from stu.model import FlashSTU
from stu.model_dir import save_model
from stu.tokenizer import Tokenizer
from tests.serve.requests import make_request
from tests.train.conftest import data  # noqa: F401
from train.data.shards import TokenShards


@pytest.fixture(autouse=True)
def threads():
    """Benchmarks set them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_command_has_what_measures(capsys):
    """Of most nothing else is tested: they take minutes."""
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    names = re.search(r"{([\w,]+)}", capsys.readouterr().out)[1].split(",")
    assert {"decode", "train", "memory", "quality"} <= set(names)
    for name in names:
        assert callable(importlib.import_module(f"benchmarks.{name}").measure), name


@pytest.mark.parametrize("layout", cli.LAYOUTS)
def test_caches_decode_the_same_tokens(layout):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=4096, layout=layout, num_layers=2, max_seq_len=256)
    model = FlashSTU(config).eval()
    answers = []
    for cache in cli.CACHES:
        engine, _ = make_engine(model, cache, batch=3, prompt_tokens=7, new_tokens=100, page_len=8)
        tokens = {engine.add(make_request([row + 1] * (5 + row), 100)): [] for row in range(3)}
        while any(len(its) < 90 for its in tokens.values()):
            for output in engine.step():
                tokens[output.request_id] += output.new_token_ids
        answers.append([its[:90] for its in tokens.values()])
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("layout", cli.LAYOUTS)
@pytest.mark.parametrize("cache", cli.CACHES)
def test_cache_bytes_are_what_is_allocated(layout, cache):
    config = ModelConfig(vocab_size=4096, width=64, layout=layout, num_layers=2, max_seq_len=300)
    subject = decode.EngineSubject(FlashSTU(config).eval(), cache, 2, 100, 200, 32, whole=False)
    caches = subject.engine._caches
    convolution = caches.convolution if cache == "paged" else subject._cache._convolution
    held = convolution.num_bytes if cache == "paged" else convolution.cache_bytes
    held += caches.pools[1].pages.nbytes if caches.pools[1] else 0
    held += caches.recent.num_bytes if caches.recent else 0
    taps, lag_step = FlashSTU(config).convolution_taps()
    shape = decode.convolution_costs.Shape(len(taps), 64, lag_step, 300, 2, 100, 200, 32)
    assert decode.convolution_costs.cache_bytes(cache, shape) == (
        held - decode.other_bytes(config, 2, 32)
    )


def test_decode_reports_every_setting_and_ratio(capsys, tmp_path, quick_timing):
    picture, file = tmp_path / "decode.png", tmp_path / "decode.json"
    settings = ["--layout", "hybrid", "--width", "64", "--layers", "4", "--new-tokens", "200"]
    settings += ["--batch", "2", "--peers", "s4", "--plot", str(picture), "--output", str(file)]
    cli.main(["decode", *settings])
    result = json.loads(capsys.readouterr().out)
    assert json.loads(file.read_text()) == result
    assert picture.read_bytes().startswith(b"\x89PNG")
    runs = {run["cache"]: run for run in result["runs"]}
    assert list(runs) == [*cli.CACHES, "s4"]
    for cache, run in runs.items():
        assert run["median_step_ms"] <= run["p99_step_ms"] <= run["largest_step_ms"]
        assert run["tokens_per_second"] == pytest.approx(2000 / run["step_ms"])
        assert run["operations_per_step"] > 50, "the batch has ended"
        for counts in (run["multiply_adds_per_token"], run["bytes_moved_per_token"]):
            assert counts["total"] == pytest.approx(sum(counts.values()) / 2)
        if cache != "paged":
            ratios = [
                its / of_paged
                for its, of_paged in zip(
                    run["step_ms_by_round"], runs["paged"]["step_ms_by_round"], strict=True
                )
            ]
            assert run["step_over_paged_by_round"] == ratios
            assert run["step_over_paged"] == sorted(ratios)[1], "the median of three rounds"
        if cache != "s4":
            assert 0 < run["convolution_ms"] + run["outside_ms"] < run["step_ms"]
    parameters = runs["s4"]["parameters"] / runs["paged"]["parameters"]
    assert parameters == pytest.approx(1, abs=0.05)
    assert runs["flashinference"]["cache_bytes"] > runs["continuous"]["cache_bytes"]
    assert set(runs["paged"]["step_ms_by_flush"]) == {
        f"a flush of {size} positions" for size in (32, 64, 128)
    }


def test_whole_runs_time_every_step(capsys, quick_timing):
    settings = ["--width", "64", "--new-tokens", "100", "--batch", "2", "--prompt-tokens", "9"]
    cli.main(["decode", *settings, "--layers", "2", "--whole", "--rounds", "1"])
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["cache"] for run in runs] == cli.CACHES
    assert all(run["step_ms"] > run["convolution_ms"] > 0 for run in runs)


def test_what_does_not_fit_is_said_and_not_attempted(capsys, monkeypatch):
    monkeypatch.setattr(rounds, "SHARE_OF_MEMORY", 0.0)
    cli.main(["decode", "--width", "64", "--new-tokens", "512", "--batch", "64", "--peers", "s4"])
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["cache"] for run in runs] == [*cli.CACHES, "s4"]
    assert all(run["not_run"].startswith("does not fit: ") for run in runs)


def test_a_run_s_time_counts_each_kind_of_step_as_often_as_it_occurs():
    plain = {"step": 10.0, "convolution": 1.0, "outside": 2.0}
    flush = {"step": 110.0, "convolution": 101.0, "outside": 2.0}
    result = summary([Sample(95.0, plain, position=5), Sample(5.0, flush, "a flush")])
    assert result["step_ms"] == pytest.approx(15)
    assert result["convolution_ms"] == pytest.approx(6)
    assert result["convolution_share"] == pytest.approx(0.4)
    assert (result["median_step_ms"], result["p99_step_ms"]) == (10, 110)
    assert result["largest_step_does"] == "a flush"
    assert result["step_ms_by_position"] == {5: 10.0}


class LinearSubject:
    """Its steps take as many milliseconds as tokens were decoded, flushes as many more."""

    def __init__(self):
        self.position, self.places, self.is_prepared = 0, [], False

    def step(self):
        self.places.append(self.position)
        self.position += 1
        return {"step": float(self.position - 1)}

    def seek(self, position):
        self.position = position

    def prepare_flushes(self):
        assert not self.places
        self.is_prepared = True

    def flushes(self):
        return [("a flush of 64 positions", 4064, 64)]


def test_no_timed_flush_is_the_first_of_its_size():
    torch.manual_seed(0)
    convolution = Continuous(torch.randn(2, 300, 4), batch=1, max_new_tokens=600, lag_step=2)
    cache = LockstepCache(convolution)
    cache.prepare_flushes()
    prepared = set(convolution._plans)
    assert prepared == {32, 64, 128, 256}
    assert len(cache.sampled_flushes()) == 4
    for _, position, _ in cache.sampled_flushes():
        convolution._flush(position // 2)
    assert set(convolution._plans) == prepared


@pytest.mark.parametrize("new_tokens", [512, 8192])
def test_a_run_s_time_is_that_of_its_middle_where_steps_take_ever_longer(new_tokens):
    samples = sampled(LinearSubject(), new_tokens)
    assert sum(sample.weight for sample in samples) == pytest.approx(new_tokens)
    plain = [sample for sample in samples if not sample.does]
    assert summary(plain)["step_ms"] == pytest.approx(new_tokens / 2, rel=0.05)
    assert [its.figures["step"] for its in samples if its.does] == [4063.0]


def test_sampled_steps_are_all_over_a_page_and_end_none():
    subject = LinearSubject()
    sampled(subject, 2048)
    assert subject.is_prepared
    places = subject.places[1:]
    del places[::4]  # the first at each place is not timed
    assert len(set(places)) == len(places) == 15
    for page in (32, 64):
        assert all((place + 1) % page for place in places)
        middle = sum(place % page for place in places) / len(places)
        assert middle == pytest.approx((page - 1) / 2, rel=0.08)


@pytest.mark.parametrize(
    ("command", "refused"),
    [
        ("decode --rounds 0", "argument --rounds: 0 is not allowed: give 1 or more"),
        ("decode --batch 8 -1", "argument --batch: -1 is not allowed: give 1 or more"),
        ("decode --new-tokens 15", "argument --new-tokens: 15 is not allowed: give 16 or more"),
        ("decode --plot none/a.png", "none/a.png: there is no folder none: make it first"),
        ("decode --device cuda --peer llama", "unrecognized arguments: --peer llama"),
        ("quality --steps 2.5", "argument --steps: 2.5 is not allowed: give 20 or more"),
        ("memory --threads 1 2", "unrecognized arguments: 2"),
        ("sizes --threads 2", "unrecognized arguments: --threads 2"),
        (
            "model {nothing}",
            "nothing.json: no timed run; make it by python -m benchmarks decode --output",
        ),
        ("decode --whole --threads 1 2", "--whole decodes to the end, once: give one number"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(capsys, tmp_path, command, refused):
    nothing = tmp_path / "nothing.json"
    nothing.write_text('{"machine": {}, "runs": [{"not_run": "does not fit"}]}')
    try:
        code = cli.main(command.format(nothing=nothing).split())
    except SystemExit as error:
        code = error.code
    assert code == 2
    output = capsys.readouterr()
    assert refused in output.err
    assert output.out == ""


def test_prompts_of_invariance_are_pieces_of_the_validation_split(data):  # noqa: F811
    tokenizer = Tokenizer(data / "tokenizer.model")
    prompts = invariance.read_prompts(data, tokenizer, 9, 4)
    assert [len(prompt) for prompt in prompts] == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    split = TokenShards(data, "validation")
    assert prompts[0] == split.read(0, 1).tolist()
    start = 7 * len(split) // 9
    assert prompts[7] == split.read(start, start + 4).tolist()
    with pytest.raises(ValueError, match="do not make 1000 prompts of up to 40; lower --prompts"):
        invariance.read_prompts(data, tokenizer, 1000, 40)
    with pytest.raises(ValueError, match="not the model's tokenizer"):
        invariance.read_prompts(data, soak.small_tokenizer(), 9, 4)


def test_the_most_memory_is_what_a_call_takes_beyond_what_was_there():
    result, gib = peak_gib(lambda: float(torch.ones(60 * 2**20).sum()))
    assert result == 60 * 2**20
    assert 1024 * gib == pytest.approx(240, rel=0.1)
    assert 1024 * peak_gib(lambda: None)[1] < 24  # and is forgotten


def test_rounds_give_the_median_of_each_sample():
    several = [
        [
            Sample(9.0, {"step": its, "convolution": 1 / its}, position=5),
            Sample(1.0, {"step": 10 * its}, "a flush"),
        ]
        for its in (4.0, 1.0, 2.0)
    ]
    assert merged(several) == [
        Sample(9.0, {"step": 2.0, "convolution": 0.5}, position=5),
        Sample(1.0, {"step": 20.0}, "a flush"),
    ]
    first = merged(several[:2])[0].figures
    assert first == {"step": 2.5, "convolution": 0.625}


def test_flushes_are_looked_at_in_mid_run():
    """Those of 32 positions are 1, 3, .. 31 pages in: 16 of them; the largest there is but once."""
    model = FlashSTU(ModelConfig(vocab_size=4096, width=16, num_layers=2, max_seq_len=1100)).eval()
    _, cache = make_engine(model, "naive", 1, 7, 1024, page_len=32)
    assert cache_flushes(cache, 1024) == [("inputs of a line put away", 512, 31)]
    for cache_name, page in (("paged", 32), ("continuous", 64)):
        _, cache = make_engine(model, cache_name, 1, 7, 1024, page_len=32)
        flushes = cache_flushes(cache, 1024)
        sizes = [page * 2**i for i in range(len(flushes))]
        assert [its[0] for its in flushes] == [f"a flush of {size} positions" for size in sizes]
        assert [its[2] for its in flushes] == [512 // size for size in sizes]
        for size, (_, position, count) in zip(sizes, flushes, strict=True):
            assert position % (2 * size) == size
            assert abs(position - 512) <= size, (cache_name, size, position, count)


@pytest.mark.parametrize("cache", ["paged", "continuous", "naive"])
def test_a_batch_that_goes_back_and_forth_does_not_end(cache):
    model = FlashSTU(ModelConfig(vocab_size=4096, width=16, num_layers=2, max_seq_len=200)).eval()
    subject = EngineSubject(model, cache, 2, 30, 100, 32, whole=False)
    columns_to_page_end = {31: 1, 3: 15, 64: 16, 95: 1, 96: 16}
    for position in [*columns_to_page_end] * 40:
        subject.seek(position)
        if cache == "paged":
            reached = subject.engine._caches.convolution._columns_reached
            assert reached == columns_to_page_end[position]
        subject.step()


@pytest.mark.parametrize("new_tokens", [100, 8192])
def test_watts_are_those_of_steps_on_end(new_tokens):
    subject = LinearSubject()
    subject.step = lambda: LinearSubject.step(subject) | {"step": 10.0}

    def leaping():
        return 7.0 * (subject.position // 10)  # of ten steps at once

    found = mean_watts(subject, new_tokens, leaping)
    assert found == pytest.approx(70, rel=0.16)
    assert len(subject.places) == (47 if new_tokens == 100 else 300)


def test_joules_are_those_of_all_packages_and_never_invented(tmp_path):
    assert joules_counter("cpu", tmp_path) is None
    for zone, microjoules in {"intel-rapl:0": 3_000_000, "intel-rapl:1": 500_000}.items():
        for folder in (tmp_path / zone, tmp_path / f"{zone}:0"):
            folder.mkdir()
            (folder / "energy_uj").write_text(f"{microjoules}\n")
            (folder / "max_energy_range_uj").write_text("4000000\n")
    joules = joules_counter("cpu", tmp_path)
    assert joules() == 0
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("900000\n")
    assert joules() == 0.4
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100000\n")  # it turned over
    assert joules() == 1.5


def test_the_head_of_a_result_names_the_commit_and_the_time(tmp_path):
    head = describe()
    assert head["commit"] == "unknown" or len(head["commit"].removesuffix("-dirty")) == 40
    assert datetime.fromisoformat(head["date"]).tzinfo is not None
    assert commit(tmp_path) == "unknown"


def test_soak_ends_with_every_page_free():
    result = soak.measure(argparse.Namespace(seconds=2.0, cache_gib=0.3, threads=1))
    assert result["samples"][-1]["new_tokens"] > 0
    assert result["samples"][-1]["convolution_pages_used"] == 0
    assert result["largest_resident_mib"] > result["weights_mib"] + result["caches_mib"]


def test_invariance_compares_alone_and_together(capsys, data, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    tokenizer = Tokenizer(data / "tokenizer.model")
    shape = {"width": 16, "num_layers": 2, "num_heads": 2, "num_filters": 4, "max_seq_len": 64}
    model = FlashSTU(ModelConfig(vocab_size=tokenizer.vocab_size, **shape))
    save_model(tmp_path / "model", model, tokenizer)
    settings = ["--prompts", "9", "--prompt-tokens", "12", "--new-tokens", "20", "--batch", "8"]
    cli.main(["invariance", str(tmp_path / "model"), str(data), *settings])
    result = json.loads(capsys.readouterr().out)
    assert result["prompts"] == 9
    assert [run["batch_invariant"] for run in result["runs"]] == [False, True]
    for run in result["runs"]:
        assert run["greedy_tokens"] == 9 * 20
    invariant = result["runs"][1]
    assert invariant["greedy_prompts_changed"] == invariant["temperature_1_prompts_changed"] == 0
