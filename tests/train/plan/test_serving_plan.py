"""Plans of decoding, against the memory of models and caches that are made."""

import json
from dataclasses import asdict

import pytest
import torch

from serve.cache.budget import CACHES, cache_plan, make_caches
from serve.config import EngineConfig
from stu.config import ModelConfig
from stu.mixers import KeyWindow, LastInputs, PastInputs
from stu.model import FlashSTU
from stu.model_dir import load_model, save_model
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


@pytest.mark.parametrize("kind", KINDS)
def test_caches_of_the_planned_size_hold_the_batch(kind):
    torch.manual_seed(0)
    model = FlashSTU(ModelConfig(**{**SHAPE, **KINDS[kind]})).eval()
    rank = cache_plan(PastInputs, model, EngineConfig()).info.rank or None
    planned, batch = Decoding(model.config, 256, 128, 1, 32, rank), 5
    cache_gib = planned.cache_bytes(batch) / 2**30
    caches = make_caches(model, EngineConfig(cache_gib=cache_gib, max_running=batch))
    needed = caches.needed(128, 128)
    for own, total in zip(needed, caches.capacity, strict=True):
        assert batch * own <= total


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
