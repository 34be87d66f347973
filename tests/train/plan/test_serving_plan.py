"""Plans of decoding, against the memory of models and caches that are made."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from serve.cache import budget
from serve.cache.budget import CACHES, cache_plan, make_caches
from serve.config import EngineConfig
from serve.engine.engine import Engine
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.layouts import LAYOUTS
from stu.mixers import KeyWindow, LastInputs, PastInputs
from stu.model import FlashSTU
from stu.model_dir import load_model, save_model
from tests.serve.requests import make_request
from train.gpus import GPUS
from train.plan import cli
from train.plan.serving import PAGE_LEN, Decoding, plans

SHAPE = {"vocab_size": 501, "width": 32, "num_layers": 4, "num_heads": 4, "num_filters": 8}
SHAPE |= {"max_seq_len": 256, "window_tokens": 40, "mlp_ratio": 3}
KINDS = {
    "hybrid": {"layout": "hybrid"},
    "full": {"layout": "stu", "stu_form": "full", "num_layers": 2},
    "hyena": {"layout": "hyena"},
    "plain": {"layout": "hyena", "blocks": "plain"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_that_of_models_and_caches(kind):
    torch.manual_seed(0)
    model = FlashSTU(ModelConfig(**{**SHAPE, **KINDS[kind]})).eval()
    made = {own: cache_plan(own, model, EngineConfig()) for own in CACHES}
    new_tokens, row_bytes, rank = 100, 0, None
    for own, found in made.items():
        if found is None:
            continue
        if own is KeyWindow:
            row_bytes += found.size.most_pages * found.size.page_bytes
        elif own is LastInputs:
            row_bytes += found.size.snapshot_bytes
        elif found.info.kind == "state":
            row_bytes += found.size.page_bytes
            rank = found.info.rank
        else:  # and the rings
            row_bytes += (-(-new_tokens // PAGE_LEN) + 2) * found.size.page_bytes
    assert (rank is None) == (made[PastInputs].info.kind == "pages")
    planned = Decoding(model.config, 256, new_tokens, 1, 32, rank)
    assert planned.row_bytes() == row_bytes
    assert planned.weight_bytes() == sum(own.nbytes for own in model.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_divide_memory_and_work(kind):
    config = ModelConfig(**{**SHAPE, **KINDS[kind], "vocab_size": 512})
    one, two, four = plans(config, 256, 128, 16, 4)
    assert [own.num_ranks for own in (one, two, four)] == [1, 2, 4]
    for own in (two, four):
        assert own.row_bytes() * own.num_ranks == one.row_bytes()
        whole = own.weight_bytes() * own.num_ranks - one.weight_bytes()
        assert 0 < whole < 0.7 * (own.num_ranks - 1) * one.weight_bytes()
        assert own.read_bytes() * own.num_ranks == pytest.approx(one.read_bytes())
    gpu = GPUS["h100-80g"]
    assert two.step_seconds(gpu, 1) > one.step_seconds(gpu, 1)  # so small a model only exchanges
    assert one.largest_batch(gpu) < two.largest_batch(gpu)
    assert one.fits(gpu, one.largest_batch(gpu))
    assert not one.fits(gpu, one.largest_batch(gpu) + 1)


@pytest.mark.parametrize(
    ("layout", "cache", "bits"),
    [
        ("hybrid", "state", 16),
        ("hybrid", "pages", 32),
        ("full", "state", 32),
        ("plain", "pages", 32),
        ("attention", None, 32),
        ("hyena and attention", "pages", 16),
    ],
)
def test_engine_with_caches_of_the_planned_size_runs_the_batch(
    layout, cache, bits, monkeypatch, code_tokenizer
):
    monkeypatch.setitem(LAYOUTS, "hyena and attention", ("hyena", "attention"))
    torch.manual_seed(0)
    shape = {**SHAPE, "layout": layout, **KINDS.get(layout, {}), "max_seq_len": 200}
    model = FlashSTU(ModelConfig(**shape | {"vocab_size": code_tokenizer.vocab_size})).eval()
    for name, parameter in model.named_parameters():
        if bits == 16 and name not in model.wide_names:
            parameter.data = parameter.data.bfloat16()
    settings = {"convolution_cache": cache, "max_running": 5}
    plans = {kind: cache_plan(kind, model, EngineConfig(**settings)) for kind in CACHES}
    monkeypatch.setattr(budget, "cache_plan", lambda kind, *_: plans[kind])  # made once
    past, page_bytes = plans[PastInputs], [own.size.page_bytes for own in plans.values() if own]
    rank = past.info.rank or None if past else None
    for length in (8, 40, 97, 200):
        planned = Decoding(model.config, length, length // 2, 1, bits, rank).cache_bytes(5)
        own = EngineConfig(**settings, cache_gib=planned / 2**30)
        engine = Engine(model, code_tokenizer, own)
        assert sum(made.num_bytes for made in engine._caches.all) <= planned
        for number in range(5):
            engine.add(make_request([number] * (length - length // 2), length // 2))
        engine.step()
        assert engine.stats().running == 5
        needed = engine._caches.needed(length - length // 2, length // 2 - 1)
        # It is no more than an engine needs, but for one page.
        less = replace(own, cache_gib=(planned - max(page_bytes) - 1) / 2**30)
        try:
            capacity = make_caches(model, less).capacity
        except UserError:
            continue
        assert any(5 * count > most for count, most in zip(needed, capacity, strict=True))


def test_filters_that_are_too_short_for_states_are_cached_in_pages():
    config = ModelConfig(**{**SHAPE, "max_seq_len": 2, "num_filters": 2, "layout": "stu"})
    (one,) = plans(config, 2, 1, 32, 1)
    assert one.rank is None
    assert cache_plan(PastInputs, FlashSTU(config), EngineConfig()).info.kind == "pages"


def test_weights_of_8_bits_are_those_of_models(tmp_path, code_tokenizer):
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": code_tokenizer.vocab_size}
    config = ModelConfig(**shape, layout="stu")
    save_model(tmp_path / "model", FlashSTU(config), code_tokenizer)
    loaded = load_model(tmp_path / "model", "cpu", torch.bfloat16, weights="int8")
    rounded = config.vocab_size * config.width  # the unembedding, which an engine rounds
    planned = Decoding(config, 256, 128, 1, 8, 8).weight_bytes()
    scales = sum(own.nbytes for name, own in loaded.state_dict().items() if "scales" in name)
    assert planned + scales == rounded + sum(own.nbytes for own in loaded.state_dict().values())


def plan(capsys, *arguments):
    code = cli.main([*map(str, arguments)])
    return code, capsys.readouterr()


def test_command_plans_a_model_directory_or_settings(tmp_path, capsys):
    config = ModelConfig(**SHAPE, layout="hybrid")
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    code, written = plan(capsys, "--serve", tmp_path, "--gpus", 2, "--gpu", "l40s-48g")
    assert code == 0
    assert "1 x l40s-48g" in written.out
    assert "2 x l40s-48g" in written.out
    code, written = plan(capsys, "--serve", tmp_path, "--batch", 5000, "--gpu", "h200-141g")
    assert code == 0
    assert "--max-running 5000" in " ".join(written.out.split())
    settings = tmp_path / "large.yaml"
    large = {**SHAPE, "width": 2**18, "num_layers": 2, "num_filters": 8, "layout": "attention"}
    settings.write_text(json.dumps(large))
    code, written = plan(capsys, "--serve", settings, "--gpus", 4, "--gpu", "a100-40g")
    assert code == 1
    assert "It fits on none of these" in written.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--serve", "nowhere"], "a model directory, or a file of a model's settings"),
        (["--serve", "{path}", "--length", "300"], "at most max_seq_len=256"),
        (["--serve", "{path}", "--gpu", "abacus"], "one of a100-40g"),
        (["--serve", "{path}", "--nodes", "2"], "--nodes is not allowed with --serve"),
        (["--serve", "{path}", "--tokens", "1e9"], "--tokens is not allowed with --serve"),
        (["--batch", "8"], "--batch is not allowed without --serve"),
        (["--length", "8"], "--length is not allowed without --serve"),
        (["--bits", "8"], "--bits is not allowed without --serve"),
        (["--serve", "{path}", "--data.seq_len", "5"], "--data.seq_len 5 is not allowed"),
    ],
)
def test_command_refuses_what_it_cannot_plan(tmp_path, capsys, arguments, message):
    path = tmp_path / "model.yaml"
    path.write_text(json.dumps({**SHAPE, "layout": "attention"}))
    code, written = plan(capsys, *(word.format(path=path) for word in arguments))
    assert code == 2
    assert message in written.err
