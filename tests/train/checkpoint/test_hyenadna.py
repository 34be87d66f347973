"""HyenaDNA's checkpoints, in both layouts of names, compute and decode as their formulas say."""

import json
import math
import re
from argparse import Namespace

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from serve.completion import CompletionBuilder
from serve.config import EngineConfig
from serve.engine.engine import Engine
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.model_dir import load_config, load_model, load_tokenizer
from tests.reference import hyenadna as reference
from tests.serve.requests import make_request
from train.checkpoint import export, import_published
from train.checkpoint.hyenadna import load_hyenadna
from train.tuning.origin import Origin

WIDTH, LAYERS, LONGEST, EMB_DIM = 12, 2, 90, 5
ORIGINAL = {
    "d_model": WIDTH,
    "n_layer": LAYERS,
    "d_inner": 4 * WIDTH,
    "vocab_size": 12,
    "embed_dropout": 0.1,
    "pad_vocab_size_multiple": 8,
    "layer": {
        "_name_": "hyena",
        "emb_dim": EMB_DIM,
        "filter_order": 64,
        "local_order": 3,
        "l_max": LONGEST,
        "modulate": True,
        "w": 10,
        "lr_pos_emb": 0.0,
    },
}
HUB = {"model_type": "hyenadna", "d_model": WIDTH, "n_layer": LAYERS, "max_seq_len": LONGEST}
HUB |= {"hyena_order": 2, "short_filter_order": 3, "num_inner_mlps": 2, "vocab_size": 12}
HUB |= {"emb_dim": EMB_DIM, "filter_order": 64, "layer_norm_epsilon": 1e-5, "train_freq": True}
NEW_TOKENS = 40
DNA = "ACGTNACGGTTAACCAGT"


def random_weights():
    """Return weights by the names that both layouts share, none of them negligible."""
    random = torch.Generator().manual_seed(5)

    def normal(*shape, scale=None):
        return torch.randn(shape, generator=random) * (scale or shape[-1] ** -0.5)

    def module(name, *shape, scale=None):
        bias = normal(shape[0], scale=0.3)
        return {f"{name}.weight": normal(*shape, scale=scale), f"{name}.bias": bias}

    def norm(name):
        return {f"{name}.weight": 1 + normal(WIDTH, scale=0.3), f"{name}.bias": normal(WIDTH)}

    lags = torch.arange(LONGEST)[:, None].float()
    angles = 2 * math.pi * lags / LONGEST * torch.linspace(1e-4, 1, 2)
    times = lags / (LONGEST - 1)
    fixed = {
        "pos_emb.z": torch.cat([times, angles.cos(), -angles.sin()], 1)[None],
        "pos_emb.t": times[None],
        "modulation.deltas": torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, WIDTH)[
            None, None
        ],
    }
    weights = {"backbone.embeddings.word_embeddings.weight": normal(16, WIDTH)}
    for i in range(LAYERS):
        frequencies = 10 + normal(1, 64, scale=1)
        layer = {
            **norm("norm1"),
            **norm("norm2"),
            **module("mlp.fc1", 4 * WIDTH, WIDTH),
            **module("mlp.fc2", WIDTH, 4 * WIDTH),
            **module("mixer.in_proj", 3 * WIDTH, WIDTH),
            **module("mixer.out_proj", WIDTH, WIDTH),
            **module("mixer.short_filter", 3 * WIDTH, 1, 3),
            "mixer.filter_fn.bias": normal(WIDTH, scale=1),
            **{f"mixer.filter_fn.{name}": tensor.clone() for name, tensor in fixed.items()},
            **module("mixer.filter_fn.implicit_filter.0", 64, EMB_DIM, scale=0.1),
            **module("mixer.filter_fn.implicit_filter.2", 64, 64, scale=0.02),
            **module("mixer.filter_fn.implicit_filter.4", 64, 64, scale=0.02),
            "mixer.filter_fn.implicit_filter.6.weight": normal(WIDTH, 64),
            **{
                f"mixer.filter_fn.implicit_filter.{place}.freq": frequencies.clone()
                for place in (1, 3, 5)
            },
        }
        weights |= {f"backbone.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return weights | norm("backbone.ln_f")


def write_original(folder, weights):
    """Write Lightning's checkpoint of a model that was trained with recomputation."""
    names = {
        name: name.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer.")
        for name in weights
    }
    state = {f"model.{names[name]}": tensor for name, tensor in weights.items()}
    state["model.lm_head.weight"] = weights["backbone.embeddings.word_embeddings.weight"].clone()
    state["val_torchmetrics.num_tokens.count"] = torch.tensor(7.0)
    folder.mkdir()
    torch.save({"state_dict": state, "epoch": 3, "global_step": 9}, folder / "weights.ckpt")
    (folder / "config.json").write_text(json.dumps(ORIGINAL))
    return folder


def write_hub(folder, weights, **changes):
    """Write a folder of the hub, in which tensors of equal memory are there once."""
    kept = {
        name: t for name, t in weights.items() if ".3.freq" not in name and ".5.freq" not in name
    }
    folder.mkdir()
    save_file(
        {f"hyena.{name}": tensor for name, tensor in kept.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(HUB | changes))
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The weights, and model directories from both layouts."""
    folder, weights = tmp_path_factory.mktemp("hyenadna"), random_weights()
    sources = [write_original(folder / "original", weights), write_hub(folder / "hub", weights)]
    for source in sources:
        output = folder / f"{source.name}-ours"
        assert import_published.main([str(source), "--output", str(output)]) == 0
    return weights, folder / "original-ours", folder / "hub-ours"


def test_runs_start_from_both_layouts(imported):
    weights, *folders = imported
    for folder in folders:
        source = folder.with_name(folder.name.removesuffix("-ours"))
        origin, expected = Origin(source), load_model(folder)
        assert origin.model.config == expected.config
        assert origin.tokenizer.files == load_tokenizer(folder).files
        name = "backbone.layers.1.mlp.fc1.weight"
        assert torch.equal(origin.model.blocks[1].mlp.up.weight, weights[name])


def test_both_layouts_give_the_same_model(imported):
    _, original, hub = imported
    first, second = load_model(original), load_model(hub)
    assert first.config == second.config
    assert (first.config.max_seq_len, first.config.vocab_size) == (LONGEST, 16)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name


@pytest.mark.parametrize("length", [1, 2, 3, 31, LONGEST])
def test_logits_equal_the_formulas(imported, length):
    weights, folder, _ = imported
    exact = {name: tensor.double().numpy() for name, tensor in weights.items()}
    tokens = np.random.default_rng(length).integers(0, 16, length)
    expected = reference.logits(exact, tokens, shift=0.05)
    with torch.no_grad():
        single = load_model(folder)(torch.from_numpy(tokens)[None])[0].numpy()
        double = load_model(folder, dtype=torch.float64)(torch.from_numpy(tokens)[None])[0].numpy()
    assert np.abs(single - expected).max() < 1e-5 * np.abs(expected).max()
    # The stored features are rounded to float32.
    assert np.abs(double - expected).max() < 1e-6 * np.abs(expected).max()
    if length == 31:  # every weight matters
        for name in exact:
            if name.endswith((".3.freq", ".5.freq")):
                continue
            changed = reference.logits(exact | {name: 1.01 * exact[name]}, tokens, shift=0.05)
            assert np.abs(changed - expected).max() > 1e-5, name
        other = reference.logits(exact, tokens, shift=0.0)
        assert np.abs(other - expected).max() > 0.01


@pytest.mark.parametrize(
    ("settings", "static"),
    [({}, False), ({"page_len": 8}, True), ({"weights": "int8"}, False)],
    ids=["steps", "static steps", "int8"],
)
def test_engine_decodes_as_the_formulas(imported, settings, static):
    """By FutureFill, in pages; prompts of several lengths run together."""
    weights, folder, _ = imported
    tokenizer = load_tokenizer(folder)
    config = EngineConfig(**{"cache_gib": 0.01, "max_running": 4, **settings})
    engine = Engine(load_model(folder), tokenizer, config, static)
    assert engine.stats().convolution_cache.kind == "pages"
    prompts = [tokenizer.encode_prompt(text) for text in (DNA, DNA[:1], "GX" + DNA[3:9])]
    requests = [make_request(prompt, NEW_TOKENS, logprobs=1) for prompt in prompts]
    builders = {engine.add(request): CompletionBuilder() for request in requests}
    while engine.has_work:
        for output in engine.step():
            builders[output.request_id].add(output)
    engine.check_integrity()
    exact = {name: tensor.double().numpy() for name, tensor in weights.items()}
    tolerance = 0.3 if "weights" in settings else 2e-5
    for prompt, builder in zip(prompts, builders.values(), strict=True):
        new = builder.completion()
        tokens = np.array([*prompt, *new.token_ids])
        logits = reference.logits(exact, tokens[:-1], shift=0.05)[len(prompt) - 1 :]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = logprobs[range(NEW_TOKENS), new.token_ids]
        assert np.abs(chosen - logprobs.max(1)).max() < tolerance
        found = [item.logprob for item in new.logprobs]
        assert np.abs(chosen - found).max() < tolerance


def test_tokenizer_is_that_of_dna(imported):
    _, folder, _ = imported
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode_prompt("ACGTNX") == [7, 8, 9, 10, 11, 6]
    assert tokenizer.decode([7, 8, 9, 10, 11]) == "ACGTN"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (-1, 1, 16)
    assert tokenizer.token_text(4) == "[PAD]"


def test_model_directory_of_8_bits_has_biases(imported, tmp_path):
    _, folder, _ = imported
    output = tmp_path / "int8"
    assert export.main([str(folder), "--output", str(output), "--weights=int8"]) == 0
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        stored = load_model(output, weights=None)(tokens)
        wide = load_model(output)(tokens)
        before = load_model(folder)(tokens)
    assert torch.allclose(stored, wide, rtol=0, atol=1e-5)
    assert 1e-4 < (stored - before).abs().max() < 0.3


def test_export_for_transformers(imported, tmp_path):
    _, folder, _ = imported
    theirs, back = tmp_path / "theirs", tmp_path / "back"
    command = [str(folder), "--output", str(theirs), "--format=transformers"]
    assert export.main(command) == 0
    made = tokenizers.Tokenizer.from_file(str(theirs / "tokenizer.json"))
    assert made.encode("ACGTNX").ids == [7, 8, 9, 10, 11, 6]
    assert import_published.main([str(theirs), "--output", str(back)]) == 0
    first, second = load_model(folder), load_model(back)
    assert first.config == second.config
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    assert load_tokenizer(back).files == load_tokenizer(folder).files


def test_published_format_refuses_it(imported, tmp_path, capsys):
    _, folder, _ = imported
    command = [str(folder), "--output", str(tmp_path / "other"), "--format=published"]
    assert export.main(command) == 2
    assert "layout='hyena' cannot be exported to the published" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"hyena_order": 3}, {}, "hyena_order=3 is not allowed: it must be 2"),
        ({"num_inner_mlps": 4}, {}, "num_inner_mlps=4 is not allowed: it must be 2"),
        ({"shift": -1}, {}, "filter_floor=-1 is not allowed: it must be a number >= 0"),
        ({}, {"backbone.layers.0.mixer.filter_fn.pos_emb.z": 1.001}, "pos_emb.z is not what the"),
        ({}, {"backbone.layers.1.mixer.filter_fn.modulation.deltas": 0.9}, "it was trained"),
        ({}, {"backbone.layers.1.mlp.fc2.bias": None}, "layers.1.mlp.fc2.bias is missing"),
        ({}, {"backbone.layers.0.mixer.extra": 1.0}, "mixer.extra is unknown"),
        ({}, {"lm_head.weight": 2.0}, "lm_head.weight differs from"),
        ({}, {"backbone.embeddings.word_embeddings.weight": None}, "weight is missing, or no"),
    ],
)
def test_other_models_are_refused(tmp_path, config, change, message, capsys):
    weights = random_weights()
    for name, factor in change.items():
        tensor = weights.pop(name, torch.ones(16, WIDTH))
        if factor is not None:
            weights[name] = factor * tensor
    source = write_hub(tmp_path / "theirs", weights, **config)
    assert import_published.main([str(source), "--output", str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(source) in error
    assert not (tmp_path / "ours").exists()


FIRST = "backbone.layers.0.mixer"
NETWORK = f"{FIRST}.filter_fn.implicit_filter"
EMBEDDING = "backbone.embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (EMBEDDING, torch.zeros(16, 0), "or no matrix"),
        (f"{FIRST}.short_filter.weight", torch.zeros(36), "[36], not [36, 1, 3]"),
        (f"{NETWORK}.0.weight", torch.zeros(3, 5), "[3, 5], not [64, 5]"),
        (f"{NETWORK}.0.weight", torch.zeros(64, 1), "filter_bands=0 is not allowed"),
        (f"{NETWORK}.2.weight", torch.zeros(()), "[], not [64, 64]"),
        (f"{NETWORK}.4.weight", torch.zeros(64, 3), "[64, 3], not [64, 64]"),
        (f"{NETWORK}.6.weight", torch.zeros(2, WIDTH, 64), "[2, 12, 64], not [12, 64]"),
        (f"{NETWORK}.2.bias", torch.zeros(3), "[3], not [64]"),
        (f"{NETWORK}.3.freq", torch.zeros(1, 64).double(), "differs from those of other layers"),
        (f"{NETWORK}.1.freq", torch.zeros(1, 64).int(), "is torch.int32, not floats"),
        ("lm_head.weight", torch.zeros(16, WIDTH).double(), "differs from"),
        (f"{FIRST}.filter_fn.pos_emb.t", torch.zeros(1, LONGEST, 1).int(), "is torch.int32"),
        (f"{FIRST}.filter_fn.pos_emb.t", torch.zeros(()), "not what the formula gives"),
        (f"{FIRST}.filter_fn.pos_emb.z", torch.zeros(1, 0, 5), "max_seq_len=0 is not allowed"),
        (f"{FIRST}.in_proj.weight", torch.zeros(36, 12).to(torch.float8_e5m2), "float8_e5m2, not"),
        (f"{FIRST}.in_proj.weight", torch.zeros(36), "of shape [36], not [36, 12]"),
    ],
)
def test_damaged_tensors_are_named(tmp_path, name, tensor, message):
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    save_file(random_weights() | {name: tensor}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=re.escape(message)):
        load_hyenadna(tmp_path, HUB)


def test_checkpoints_with_other_objects_say_what_to_do(tmp_path, capsys):
    """As those on the hub, which hold their settings."""
    source = write_original(tmp_path / "theirs", random_weights())
    contents = torch.load(source / "weights.ckpt", weights_only=True)
    torch.save(contents | {"hyper_parameters": Namespace(lr=1)}, source / "weights.ckpt")
    assert import_published.main([str(source), "--output", str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert "weights.ckpt: cut short, or not a file of tensors alone" in error
    assert "save {'state_dict': ..} with its tensors alone again" in error
    assert "end in -hf" in error


def test_epsilon_is_that_of_the_configuration(tmp_path, capsys):
    source = write_hub(tmp_path / "theirs", random_weights(), layer_norm_epsilon=1e-3)
    command = [str(source), "--output", str(tmp_path / "ours")]
    assert import_published.main([*command, "--norm-eps=1e-6"]) == 2
    assert "leave it out: config.json has it" in capsys.readouterr().err
    assert import_published.main(command) == 0
    assert load_config(tmp_path / "ours").norm_eps == 1e-3


def test_a_new_model_of_such_blocks_trains():
    torch.manual_seed(0)
    shape = {"vocab_size": 16, "width": 8, "num_layers": 2, "max_seq_len": 20, "layout": "hyena"}
    model = FlashSTU(ModelConfig(**shape, blocks="plain", filter_bands=2, filter_floor=0.05))
    tokens = torch.randint(0, 16, (2, 20))
    loss = torch.nn.functional.cross_entropy(
        model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    loss.backward()
    for name, weight in model.named_parameters():
        assert weight.isfinite().all(), name
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name
