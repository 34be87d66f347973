"""The benchmarks measure what they say: same tokens from every cache, all figures there."""

import argparse
import json

import pytest
import torch

from benchmarks import cli, decode, soak
from benchmarks.decode import make_engine
from serve.request import Request
from stu.checkpoint import save_model
from stu.config import ModelConfig
from stu.model import FlashSTU


@pytest.fixture(autouse=True)
def threads():
    """Benchmarks set them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["stu", "hybrid"])
def test_peers_decode_the_same_tokens(layout):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=4096, layout=layout, num_layers=2, max_seq_len=256)
    model = FlashSTU(config).eval()
    answers = []
    for cache in cli.CACHES:
        engine, _ = make_engine(model, cache, batch=3, new_tokens=100, page_len=8)
        tokens = {engine.add(Request([row + 1] * (5 + row), 100)): [] for row in range(3)}
        while any(len(its) < 90 for its in tokens.values()):
            for output in engine.step():
                tokens[output.request_id] += output.tokens
        answers.append([its[:90] for its in tokens.values()])
    assert answers[0] == answers[1] == answers[2]


def test_decode_reports_every_setting_and_ratio(capsys, tmp_path):
    picture, file = tmp_path / "decode.png", tmp_path / "decode.json"
    settings = ["--layout", "hybrid", "--mlp-ratio", "4", "--new-tokens", "200", "--batch", "2"]
    cli.main(["decode", *settings, "--plot", str(picture), "--output", str(file)])
    result = json.loads(capsys.readouterr().out)
    assert json.loads(file.read_text()) == result
    assert picture.read_bytes().startswith(b"\x89PNG")
    runs = {run["cache"]: run for run in result["runs"]}
    assert list(runs) == cli.CACHES
    for cache, run in runs.items():
        assert 0 < run["convolution_ms"] + run["outside_ms"] < run["step_ms"]
        assert run["median_step_ms"] <= run["p99_step_ms"] <= run["largest_step_ms"]
        if cache != "paged":
            assert run["step_over_paged"] == run["step_ms"] / runs["paged"]["step_ms"]
    assert set(runs["paged"]["step_ms_by_flush"]) == {
        f"a flush of {size} positions" for size in (32, 64, 128)
    }


def test_a_run_s_time_counts_each_kind_of_step_as_often_as_it_occurs():
    plain = {"step": 10.0, "convolution": 1.0, "outside": 2.0, "position": 5}
    flush = {"step": 110.0, "convolution": 101.0, "outside": 2.0}
    result = decode.summary([(95.0, "", plain), (5.0, "a flush", flush)])
    assert result["step_ms"] == pytest.approx(15)
    assert result["convolution_ms"] == pytest.approx(6)
    assert result["convolution_share"] == pytest.approx(0.4)
    assert (result["median_step_ms"], result["p99_step_ms"]) == (10, 110)
    assert result["largest_step_does"] == "a flush"


def test_soak_ends_with_every_page_free():
    result = soak.measure(argparse.Namespace(seconds=2.0, cache_gib=0.3, threads=[1]))
    assert result["samples"][-1]["new_tokens"] > 0
    assert result["samples"][-1]["convolution_pages_used"] == 0
    assert result["largest_resident_mib"] > result["weights_mib"] + result["caches_mib"]


def test_invariance_compares_alone_and_together(capsys, tmp_path):
    torch.manual_seed(0)
    tokenizer = soak.small_tokenizer()
    shape = {"width": 16, "num_layers": 2, "num_heads": 2, "num_filters": 4, "max_seq_len": 64}
    model = FlashSTU(ModelConfig(vocab_size=tokenizer.vocab_size, **shape))
    save_model(tmp_path / "model", model, tokenizer)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "the " * i}) + "\n" for i in range(9)))
    settings = ["--new-tokens", "20", "--batch", "8"]
    cli.main(["invariance", str(tmp_path / "model"), str(prompts), *settings])
    result = json.loads(capsys.readouterr().out)
    assert result["prompts"] == 9
    assert [run["batch_invariant"] for run in result["runs"]] == [False, True]
    for run in result["runs"]:
        assert run["greedy_tokens"] == 9 * 20
    invariant = result["runs"][1]
    assert invariant["greedy_prompts_changed"] == invariant["temperature_1_prompts_changed"] == 0
