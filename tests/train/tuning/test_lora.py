"""Adapters: what they compute, which weights training changes, and models merged at export."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.model_dir import load_model
from tests import forked
from tests.train.conftest import MODEL, parallel, slow
from tests.train.parallel.test_zero import assert_close
from tests.train.saved import assert_same_state, checkpoint, load_checkpoint
from train import cli
from train.checkpoint.export import export
from train.checkpoint.export import main as export_command
from train.lora import LoraConfig, adapter_tensors, add_adapters, merged

STEPS, SAVED = 4, 2
LORA = "--lora.r=3", "--lora.lora_alpha=12"


def adapted(layout, config, seed=0):
    """Return a model with adapters that are not zero, in float64, and its weights before."""
    torch.manual_seed(seed)
    model = FlashSTU(ModelConfig(**{**MODEL, "layout": layout}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapters(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval(), before


@pytest.mark.parametrize("layout", ["hybrid", "hyena", "stu"])
def test_merged_model_computes_the_same(layout):
    config = LoraConfig(3, 7.0)
    model, before = adapted(layout, config)
    tokens = torch.randint(300, (2, 21))
    plain = FlashSTU(model.config)
    plain.load_state_dict(before)
    weights = merged(model.state_dict(), config)
    assert weights.keys() == before.keys()
    whole = FlashSTU(model.config)
    whole.load_state_dict(weights)
    expected, actual, without = model(tokens), whole(tokens), plain(tokens)
    assert (expected - without).abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    for name, tensor in before.items():
        is_adapted = name.removesuffix("weight") + "lora_A.weight" in model.state_dict()
        assert torch.equal(weights[name], tensor) != is_adapted, name


def test_layer_equals_the_formula():
    model, before = adapted("hybrid", LoraConfig(2, 5.0, 0.5, ["up"]))
    layer, x = model.blocks[1].mlp.up, torch.randn(4, 16)
    weight, a, b = layer.weight, layer.lora_A.weight, layer.lora_B.weight
    expected = x @ before["blocks.1.mlp.up.weight"].T + 5.0 / 2 * (x @ a.T) @ b.T
    torch.testing.assert_close(layer(x), expected)
    layer.train()
    torch.manual_seed(5)
    dropped = layer(x)
    torch.manual_seed(5)
    torch.testing.assert_close(dropped, F.linear(x, weight) + 2.5 * F.dropout(x, 0.5) @ a.T @ b.T)
    assert len(adapter_tensors(model.state_dict())) == 2 * MODEL["num_layers"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        *adapter_tensors(model.state_dict())
    ]


def test_new_adapters_change_nothing_and_follow_the_seed():
    config, tokens = LoraConfig(3), torch.randint(300, (1, 9))
    drawn = []
    for extra in (0, 5):
        torch.manual_seed(3)
        model = FlashSTU(ModelConfig(**MODEL))
        expected = model(tokens)
        torch.rand(extra)
        add_adapters(model, config)
        assert torch.equal(model(tokens), expected)
        drawn.append(adapter_tensors(model.state_dict()))
    for name, tensor in drawn[0].items():
        assert torch.equal(tensor, drawn[1][name])
        assert ("lora_A" in name) == bool(tensor.any())


@pytest.fixture(scope="module")
def origin(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin") / "model"
    export(trained, folder)
    return folder


@pytest.fixture(scope="module")
def arguments(settings, origin):
    """Function that returns the arguments of a run with adapters."""
    settings = [text for text in settings if not text.startswith("--model.config.")]
    settings += [f"--init-from={origin}", f"--trainer.max_steps={STEPS}", *LORA]
    return lambda run, *more: [
        *settings,
        f"--checkpoint-every-steps={SAVED}",
        f"--run-dir={run}",
        *more,
    ]


@pytest.fixture(scope="module")
def tuned(arguments, tmp_path_factory):
    run = tmp_path_factory.mktemp("tuned") / "run"
    assert cli.main(arguments(run, "--trainer.devices=1")) == 0
    return run


def test_only_adapters_are_trained(tuned, origin):
    saved = load_checkpoint(checkpoint(tuned, STEPS))
    weights = {name.removeprefix("model."): t for name, t in saved["state_dict"].items()}
    base = load_file(origin / "model.safetensors")
    for name, tensor in base.items():
        assert torch.equal(weights[name], tensor), name
    adapters = adapter_tensors(weights)
    assert {*weights} - {*base} == {*adapters}
    assert all(tensor.any() for tensor in adapters.values())
    groups = saved["optimizer_states"][0]["param_groups"]
    assert sum(len(group["params"]) for group in groups) == len(adapters)
    assert len(saved["optimizer_states"][0]["state"]) == len(adapters)


def test_export_merges(tuned, origin, tmp_path):
    export(tuned, tmp_path / "merged")
    saved = load_checkpoint(checkpoint(tuned, STEPS))
    weights = {name.removeprefix("model."): t for name, t in saved["state_dict"].items()}
    model = load_model(origin)
    add_adapters(model, LoraConfig(3, 12.0))
    model.load_state_dict(weights)
    whole, tokens = load_model(tmp_path / "merged"), torch.randint(300, (2, 30))
    torch.testing.assert_close(whole(tokens), model.eval()(tokens), rtol=0, atol=1e-5)
    assert not torch.equal(whole(tokens), load_model(origin)(tokens))


def test_adapters_alone_are_written_as_peft_has_them(tuned, trained, tmp_path, capsys, monkeypatch):
    assert export_command([str(tuned), "--format=adapter", f"--output={tmp_path / 'lora'}"]) == 0
    saved = load_checkpoint(checkpoint(tuned, STEPS))
    start = "base_model.model.model."
    actual = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    expected = {
        f"{start}{name.removeprefix('model.')}": tensor
        for name, tensor in adapter_tensors(saved["state_dict"]).items()
    }
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 12.0)
    assert config["target_modules"] == ["down", "gate", "output", "qkv", "up"]
    monkeypatch.setattr("train.lora.merged", None)  # nothing is merged for them
    command = [str(tuned), "--format=adapter", f"--output={tmp_path / 'narrow'}"]
    assert export_command([*command, "--dtype=bfloat16"]) == 0
    narrow = load_file(tmp_path / "narrow" / "adapter_model.safetensors")
    assert narrow.keys() == expected.keys()
    assert all(torch.equal(narrow[name], expected[name].bfloat16()) for name in expected)
    assert export_command([str(trained), "--format=adapter", f"--output={tmp_path / 'x'}"]) == 2
    assert "--lora.r" in capsys.readouterr().err


@pytest.mark.slow
def test_resumed_run_is_bit_equal(tuned, arguments, tmp_path, capsys):
    run = tmp_path / "run"
    resume = f"--resume={checkpoint(tuned, SAVED)}"
    assert cli.main(arguments(run, "--trainer.devices=1", resume, "--lora.r=4")) == 2
    assert "lora.r=4, but the checkpoint was trained with 3" in capsys.readouterr().err
    assert cli.main(arguments(run, "--trainer.devices=1", resume)) == 0
    expected = load_checkpoint(checkpoint(tuned, STEPS))
    assert_same_state(load_checkpoint(checkpoint(run, STEPS)), expected)


def test_resumed_run_does_not_need_the_option(tuned, settings, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(L.Trainer, "fit", lambda self, module, **_: begun.append(module))
    resume = f"--resume={checkpoint(tuned, SAVED)}", f"--run-dir={tmp_path / 'run'}"
    assert cli.main([*settings, *LORA, *resume, f"--trainer.max_steps={STEPS}"]) == 0
    assert adapter_tensors(begun[0].model.state_dict())


@pytest.mark.parametrize(
    ("stage", "is_resumed"),
    [(2, True), slow(2, False), *(slow(s, r) for s in (None, 0, 1, 3, "fsdp") for r in (0, 1))],
)
def test_ranks_equal_one_process(tuned, arguments, tmp_path, stage, is_resumed):
    more = [f"--{name}={value}" for name, value in parallel(stage).items()]
    more += ["--trainer.devices=2", "--data.micro_batch_size=1"]
    more += [f"--resume={checkpoint(tuned, SAVED)}"] if is_resumed else []
    given = arguments(tmp_path / "run", *more)
    done = forked.run(forked.program("stu-train"), *given, PYTHONPATH=str(Path.cwd()))
    assert done.returncode == 0, done.stderr[-3000:]
    actual = load_checkpoint(checkpoint(tmp_path / "run", STEPS))
    expected = load_checkpoint(checkpoint(tuned, STEPS))
    assert_close(actual, expected)
    assert actual["stu"]["lora"] == expected["stu"]["lora"]
    assert actual["stu"]["init_from"] == expected["stu"]["init_from"]
    for name in expected["state_dict"]:
        if "lora" not in name:
            assert torch.equal(actual["state_dict"][name], expected["state_dict"][name]), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--lora.r=-1"], "lora.r=-1 is not allowed"),
        (["--lora.lora_dropout=1"], "lora.lora_dropout=1.0 is not allowed"),
        (["--lora.lora_alpha=0"], "lora.lora_alpha=0.0 is not allowed"),
        (["--lora.target_modules=[up,none]"], "or a list of some of down, gate, output, qkv, up"),
        (["--init-from=null"], "it needs --init-from"),
        (["--model.optimizer.name=muon"], "model.optimizer.name=muon is not allowed"),
    ],
)
def test_wrong_settings(arguments, tmp_path, capsys, given, message):
    assert cli.main(arguments(tmp_path / "run", *given)) == 2
    assert message in capsys.readouterr().err.replace('"', "")
    assert not (tmp_path / "run").exists()
