"""Checkpoints of the published code compute the same here, and survive a round trip bit for bit."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stu.common.safetensors import write_safetensors
from stu.config import ModelConfig
from stu.filters import spectral_filters
from stu.layers import RMSNorm
from stu.model import FlashSTU
from stu.model_dir import load_config, load_generation, load_model, load_tokenizer, save_model
from stu.tokenizer import MOST_UNUSED
from tests import forked
from tests.reference import published
from train.checkpoint import export, import_published

HYBRID = {"model_type": "FlashSTU", "torch_dtype": "float32", "bias": False, "vocab_size": 280}
HYBRID |= {"n_embd": 24, "n_heads": 3, "n_layers": 3, "seq_len": 37, "window_size": 5}
HYBRID |= {"mlp_scale": 2, "num_eigh": 4, "softcap": 3.0, "dropout": 0.1, "hidden_act": "swish"}
HYBRID |= {"use_hankel_L": False, "use_flash_fft": True, "use_approx": True, "use_attn": True}
PUBLISHED_FILES = "config.json", "model.safetensors", "tokenizer.model"
HEAD, NORM = "lm_head.weight", "norm.weight"
MISSING = "missing"
FULL = {**HYBRID, "use_approx": False, "use_attn": False, "n_layers": 2, "norm_eps": 0.01}


def random_weights(config):
    """Return weights by published name, none of them negligible; the filters differ in sign."""
    random = torch.Generator().manual_seed(7)
    width, hidden = config["n_embd"], config["n_embd"] * config["mlp_scale"]
    num_filters = config["num_eigh"]

    def normal(*shape, scale=None):
        return torch.randn(shape, generator=random) * (scale or shape[-1] ** -0.5)

    filters = torch.from_numpy(spectral_filters(config["seq_len"], num_filters)).float()
    weights = {"tok_emb.weight": normal(config["vocab_size"], width), "phi": -filters.flip(1)}
    weights["lm_head.weight"] = weights["tok_emb.weight"].clone()
    weights["norm.weight"] = 1 + normal(width, scale=0.3)
    for i in range(config["n_layers"]):
        attention = config["use_attn"] and i % 2 == 1
        layer = {
            "attn_norm.weight" if attention else "stu_norm.weight": 1 + normal(width, scale=0.3),
            "mlp_norm.weight": 1 + normal(width, scale=0.3),
            "mlp.gate_proj.weight": normal(hidden, width),
            "mlp.up_proj.weight": normal(hidden, width),
            "mlp.down_proj.weight": normal(width, hidden),
        }
        if attention:
            # Large, so that the softcap is felt.
            layer["attn.c_attn.weight"] = normal(3 * width, width, scale=0.5)
            layer["attn.c_proj.weight"] = normal(width, width)
        elif config["use_approx"]:
            layer["stu.M_inputs"] = normal(width, width)
            layer["stu.M_filters"] = normal(num_filters, width, scale=1)
        else:
            layer["stu.M_phi_plus"] = normal(num_filters, width, width)
            layer["stu.M_phi_minus"] = normal(num_filters, width, width)
        weights |= {f"layers.{i}.{name}": value for name, value in layer.items()}
    return weights


def write(folder, config, weights):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if weights is not None:
        save_file(weights, folder / "model.safetensors")
    return folder


def run_import(source, code_tokenizer, output):
    arguments = [str(source), "--output", str(output), "--tokenizer", str(code_tokenizer.path)]
    return import_published.main(arguments)


@pytest.fixture(scope="module", params=[HYBRID, FULL], ids=["hybrid tensordot", "full STU"])
def imported(request, tmp_path_factory, code_tokenizer):
    folder = tmp_path_factory.mktemp("published")
    source = write(folder / "theirs", request.param, random_weights(request.param))
    assert run_import(source, code_tokenizer, folder / "ours") == 0
    return request.param, source, folder / "ours"


@pytest.mark.parametrize("length", [1, 2, 7, 20, 37])
def test_logits_equal_the_published_formula(imported, length):
    config, source, folder = imported
    weights = load_file(source / "model.safetensors")
    weights = {name: value.double().numpy() for name, value in weights.items()}
    tokens = np.random.default_rng(length).integers(0, 280, length)
    expected = published.logits(weights, config, tokens)
    with torch.no_grad():
        logits = load_model(folder, dtype=torch.float64)(torch.from_numpy(tokens)[None])[0]
        single = load_model(folder)(torch.from_numpy(tokens)[None])[0]
    # Torch's slopes are float32 everywhere.
    assert np.abs(logits.numpy() - expected).max() < 1e-7 * np.abs(expected).max()
    assert np.abs(single.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def test_settings_and_tokenizer_are_imported(imported, code_tokenizer):
    config, _, folder = imported
    assert load_config(folder).norm_eps == config.get("norm_eps", 2**-23)
    assert load_tokenizer(folder).sha256 == code_tokenizer.sha256
    assert load_generation(folder)["max_new_tokens"] == 18
    assert {*os.listdir(folder)} == {*PUBLISHED_FILES, "generation.json"}


@pytest.mark.parametrize("form", ["tensordot", "full"])
@pytest.mark.parametrize("layout", ["hybrid", "stu"])
def test_round_trip(tmp_path, code_tokenizer, form, layout, caplog):
    torch.manual_seed(0)
    shape = {"vocab_size": 280, "width": 16, "num_layers": 3, "num_filters": 3, "max_seq_len": 33}
    shape |= {"mlp_ratio": 3, "num_heads": 2, "window_tokens": 7, "softcap": 20.0}
    config = ModelConfig(**shape, layout=layout, stu_form=form)
    model = FlashSTU(config)
    model.filters.mul_(-1.5)
    save_model(tmp_path / "ours", model, code_tokenizer)
    arguments = [str(tmp_path / "ours"), "--output", str(tmp_path / "theirs")]
    assert export.main([*arguments, "--format", "published"]) == 0
    assert (
        "norm_eps is 1e-05, but the published code uses PyTorch's default, 1.19209e-07"
        in caplog.text
    )
    assert {*os.listdir(tmp_path / "theirs")} == {*PUBLISHED_FILES}
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert torch.equal(theirs["lm_head.weight"], theirs["tok_emb.weight"])
    assert torch.equal(theirs["phi"], model.filters)
    assert run_import(tmp_path / "theirs", code_tokenizer, tmp_path / "again") == 0
    again = load_model(tmp_path / "again", dtype=None)
    assert again.config == config
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


@pytest.mark.parametrize("layout", ["hyena", "attention"])
def test_layouts_that_the_published_code_lacks_are_refused(
    tmp_path, code_tokenizer, layout, capsys
):
    config = ModelConfig(vocab_size=280, width=16, num_heads=2, max_seq_len=33, layout=layout)
    save_model(tmp_path / "ours", FlashSTU(config), code_tokenizer)
    arguments = [str(tmp_path / "ours"), "--output", str(tmp_path / "theirs")]
    assert export.main([*arguments, "--format", "published"]) == 2
    assert f"layout='{layout}' cannot be exported to the published" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["ours"]


def test_published_files_survive_import_and_export(imported, tmp_path):
    config, source, folder = imported
    assert export.main([str(folder), "--output", str(tmp_path / "t"), "--format=published"]) == 0
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "t" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    written = json.loads((tmp_path / "t" / "config.json").read_text())
    kept = config.keys() - {"dropout", "use_flash_fft", "hidden_act"}
    assert {key: written[key] for key in kept} == {key: config[key] for key in kept}


def test_bfloat16(tmp_path, code_tokenizer):
    weights = {name: value.bfloat16() for name, value in random_weights(HYBRID).items()}
    source = write(tmp_path / "theirs", HYBRID, weights)
    assert run_import(source, code_tokenizer, tmp_path / "ours") == 0
    model = load_model(tmp_path / "ours", dtype=None)
    assert model.filters.dtype == torch.float32
    assert torch.equal(model.filters, weights["phi"].float())
    assert torch.equal(model.embedding.weight, weights["tok_emb.weight"])

    arguments = [str(tmp_path / "ours"), "--output", str(tmp_path / "back"), "--format=published"]
    assert export.main([*arguments, "--dtype=bfloat16"]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.pop("phi").dtype == torch.float32
    assert all(torch.equal(back[name], weights[name]) for name in back)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16"


def test_model_directory_is_exported_with_its_defaults(imported, tmp_path, code_tokenizer):
    _, _, folder = imported
    save_model(tmp_path / "a", load_model(folder), code_tokenizer, {"temperature": 0.7})
    arguments = [str(tmp_path / "a"), "--output", str(tmp_path / "b"), "--dtype=bfloat16"]
    assert export.main(arguments) == 0
    assert load_generation(tmp_path / "b")["temperature"] == 0.7
    assert load_model(tmp_path / "b", dtype=None).norm.weight.dtype == torch.bfloat16


def prefixed(weights, prefix):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def without(weights, name):
    return {kept: value for kept, value in weights.items() if kept != name}


def with_filters_in_layers(weights):
    filters = {f"layers.{i}.stu.phi": weights["phi"].clone() for i in (0, 2)}
    return without(weights, "phi") | filters


def with_compiled_layers(weights):
    return {name.replace(".stu.", ".stu._orig_mod."): value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        (".safetensors", lambda weights: prefixed(weights, "_orig_mod.module.")),
        (".pt", lambda weights: prefixed(weights, "model._orig_mod.")),
        (".pth", lambda weights: prefixed(weights, "module._orig_mod.model.module.")),
        (".safetensors", with_compiled_layers),
        (".bin", with_filters_in_layers),
        (".safetensors", lambda weights: without(weights, "lm_head.weight")),
        (".bin", lambda weights: without(weights, "tok_emb.weight")),
        (".pt", lambda weights: {"model": weights, "step": 5}),
        (".pth", lambda weights: {"state_dict": prefixed(weights, "model."), "epoch": 3}),
    ],
)
def test_other_files_and_names(tmp_path, code_tokenizer, suffix, change):
    weights = random_weights(HYBRID)
    source = write(tmp_path / "theirs", HYBRID, None)
    save = save_file if suffix == ".safetensors" else torch.save
    save(change(dict(weights)), source / f"model_00500{suffix}")
    for name, path in {"a": source, "b": source / f"model_00500{suffix}"}.items():
        assert run_import(path, code_tokenizer, tmp_path / name) == 0
        model = load_model(tmp_path / name)
        assert torch.equal(model.filters, weights["phi"])
        assert torch.equal(model.embedding.weight, weights["tok_emb.weight"])
        assert torch.equal(model.blocks[2].mixer.input_matrix, weights["layers.2.stu.M_inputs"])


def write_parts(folder, weights):
    """Write three files and their index, and return the index."""
    places = {}
    for number in range(3):
        names, file = sorted(weights)[number::3], f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: weights[name] for name in names}, folder / file)
        places |= dict.fromkeys(names, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_several_files_with_an_index(tmp_path, code_tokenizer, capsys):
    weights = random_weights(HYBRID)
    source = write(tmp_path / "theirs", HYBRID, None)
    index = write_parts(source, prefixed(weights, "model._orig_mod."))
    for name, path in {"a": source, "b": index}.items():
        assert run_import(path, code_tokenizer, tmp_path / name) == 0
        model = load_model(tmp_path / name)
        assert torch.equal(model.embedding.weight, weights["tok_emb.weight"])
    contents = json.loads(index.read_text())
    capsys.readouterr()
    (source / "model-00002-of-00003.safetensors").rename(tmp_path / "gone.safetensors")
    assert run_import(source, code_tokenizer, tmp_path / "c") == 2
    error = capsys.readouterr().err
    assert "index.json: model-00002-of-00003.safetensors, which it names, is not a file" in error
    refusal = "model.safetensors.index.json, which it names, is not a file of weights"
    (tmp_path / "gone.safetensors").rename(source / "model-00002-of-00003.safetensors")
    for change, message in [
        ({"model.norm.weight": "../gone.safetensors"}, "../gone.safetensors, which it names"),
        ({"model.norm.weight": index.name}, refusal),
        ({"model.odd": "model-00001-of-00003.safetensors"}, "has no model.odd, unlike the index"),
    ]:
        index.write_text(json.dumps({"weight_map": contents["weight_map"] | change}))
        assert run_import(source, code_tokenizer, tmp_path / "c") == 2
        assert message in capsys.readouterr().err
    index.write_text("[]")
    assert run_import(source, code_tokenizer, tmp_path / "c") == 2
    assert "not an index of weights" in capsys.readouterr().err
    index.unlink()
    assert run_import(source, code_tokenizer, tmp_path / "c") == 2
    assert "several with one model.safetensors.index.json are needed" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_epsilon_of_the_norms(tmp_path, code_tokenizer, caplog, capsys):
    """The option overrides config.json, which overrides PyTorch's default."""
    weights = random_weights(HYBRID)
    without = write(tmp_path / "without", HYBRID, weights)
    with_eps = write(tmp_path / "with", HYBRID | {"norm_eps": 1e-3}, weights)
    torch.manual_seed(0)
    theirs = torch.nn.RMSNorm(8)
    x = 1e-3 * torch.randn(5, 8)
    for name, source, more, expected in [
        ("a", without, [], torch.finfo(torch.float32).eps),
        ("b", with_eps, [], 1e-3),
        ("c", without, ["--norm-eps=1e-6"], 1e-6),
        ("d", with_eps, ["--norm-eps=1e-6"], 1e-6),
    ]:
        caplog.clear()
        arguments = [str(source), "--output", str(tmp_path / name), *more]
        assert import_published.main([*arguments, "--tokenizer", str(code_tokenizer.path)]) == 0
        eps = load_config(tmp_path / name).norm_eps
        assert eps == expected
        assert ("PyTorch's default, 1.19209e-07" in caplog.text) == (name == "a")
        is_theirs = torch.allclose(RMSNorm(8, eps)(x), theirs(x), rtol=1e-6)
        assert is_theirs == (name == "a")
    with pytest.raises(SystemExit) as ended:
        import_published.main([*arguments, "--tokenizer", "x", "--norm-eps=-1"])
    assert ended.value.code == 2
    assert "norm-eps" in capsys.readouterr().err.replace("_", "-")


def test_torch_file_that_is_not_an_archive(tmp_path, code_tokenizer):
    source = write(tmp_path / "theirs", HYBRID, None)
    torch.save(random_weights(HYBRID), source / "model.pt", _use_new_zipfile_serialization=False)
    assert run_import(source, code_tokenizer, tmp_path / "ours") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": True}, "bias=True is not allowed: it must be false, because the layers"),
        ({"use_hankel_L": True}, "use_hankel_L=True is not allowed"),
        ({"stu_enable_mlp_sandwich": True}, "stu_enable_mlp_sandwich=True is not allowed"),
        ({"n_embd": None}, "n_embd=None is not allowed: it must be a whole number >= 1"),
        ({"mlp_scale": 2.5}, "mlp_scale=2.5 is not allowed: it must be a whole number >= 1"),
        ({"window_size": [5, 0]}, "window_size=[5, 0] is not allowed: it must be a whole number"),
        ({"n_heads": 5}, "n_heads=5 is not allowed: it must be a number that divides n_embd=24"),
        ({"use_attn": 1}, "use_attn=1 is not allowed: it must be true or false"),
        ({"softcap": 0}, "softcap=0 is not allowed: it must be a positive number"),
        ({"use_attn": False}, "layers.1.stu_norm.weight is missing"),
        ({"use_approx": False}, "layers.0.stu.M_phi_plus is missing"),
        ({"n_layers": 2}, "does not fit config.json: layers.2."),
        ({"seq_len": 40}, "phi is torch.float32 [37, 4], not floats of 16 bits or more [40, 4]"),
        *(
            ({key: MISSING}, f"config.json: {key} missing: add what")
            for key in ("n_embd", "n_heads", "window_size", "softcap", "mlp_scale")
        ),
    ],
)
def test_settings_that_do_not_fit(tmp_path, code_tokenizer, change, message, capsys):
    config = {name: value for name, value in (HYBRID | change).items() if value != MISSING}
    refused(tmp_path, code_tokenizer, config, random_weights(HYBRID), message, capsys)


def refused(tmp_path, tokenizer, config, weights, message, capsys):
    """Import a checkpoint, which is refused with this message, and return the whole message."""
    source = write(tmp_path / "theirs", config, weights)
    assert run_import(source, tokenizer, tmp_path / "ours") == 2
    error = capsys.readouterr().err
    assert message in error
    assert os.listdir(tmp_path) == ["theirs"]
    return error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {"layers.1.attn.c_attn.bias": torch.zeros(72)}, "attn.c_attn.bias is unknown"),
        (lambda old: {HEAD: old[HEAD] + 1}, "lm_head.weight differs from tok_emb.weight"),
        (lambda old: {"layers.2.stu.phi": old["phi"] * 2}, "layers.2.stu.phi differs from phi"),
        (lambda old: {NORM: old[NORM].int()}, "norm.weight is torch.int32 [24]"),
        (
            lambda old: {NORM: old[NORM].to(torch.float8_e4m3fn)},
            "norm.weight is torch.float8_e4m3f",
        ),
        (lambda old: {f"module.{NORM}": old[NORM].clone()}, "norm.weight is there twice"),
        (lambda _: {"phi": None}, "phi is missing: the signs"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, code_tokenizer, change, message, capsys):
    weights = random_weights(HYBRID)
    weights |= change(weights)
    weights = {name: value for name, value in weights.items() if value is not None}
    error = refused(tmp_path, code_tokenizer, HYBRID, weights, message, capsys)
    assert f"{tmp_path / 'theirs' / 'model.safetensors'}: " in error


def test_tokenizer_of_another_size_is_refused(tmp_path, code_tokenizer, capsys):
    for size in (279, 280 + MOST_UNUSED + 1):
        (tmp_path / str(size)).mkdir()
        config = HYBRID | {"vocab_size": size}
        message, weights = f"has 280 tokens and the model vocab_size={size}", random_weights(config)
        error = refused(tmp_path / str(size), code_tokenizer, config, weights, message, capsys)
        assert "give the tokenizer that the model was trained with" in error


def test_files_that_are_no_checkpoint(tmp_path, code_tokenizer, capsys):
    source = write(tmp_path / "theirs", HYBRID, None)
    other = tmp_path / "other.pt"
    torch.save({"norm.weight": torch.zeros(2), "epoch": 3}, other)
    torch.save({"weights": ValueError("any object")}, source / "a.pt")
    (source / "b.safetensors").write_bytes(b"hello")
    for path, message in [
        (tmp_path / "none", "no such file or folder"),
        (source, "(a.pt, b.safetensors found): name the file"),
        (source / "a.pt", "cut short, or not a file of tensors alone (UnpicklingError)"),
        (source / "b.safetensors", "not a whole safetensors file"),
        (other, "config.json: no such file"),
    ]:
        assert run_import(path, code_tokenizer, tmp_path / "ours") == 2
        assert message in capsys.readouterr().err
    other.rename(source / "other.pt")
    assert run_import(source / "other.pt", code_tokenizer, tmp_path / "ours") == 2
    assert "epoch is not a tensor: save model.state_dict() alone" in capsys.readouterr().err
    (source / "config.json").write_text("{")
    assert run_import(source / "other.pt", code_tokenizer, tmp_path / "ours") == 2
    assert "config.json: Expecting" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_safetensors_written_one_by_one(tmp_path):
    """They are cast where asked, and aligned so that they can be mapped."""
    tensors = {
        "odd": torch.arange(3.0).bfloat16(),
        "wide": torch.randn(2, 5, dtype=torch.float64),
        "strided": torch.randn(4, 6).T,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "narrowed": torch.randn(7, 3),
    }
    write_safetensors(tmp_path / "file", tensors, {"a": "b"}, {"narrowed": torch.float16})
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    tensors["narrowed"] = tensors["narrowed"].half()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name
        assert read[name].data_ptr() % tensor.itemsize == 0


PEAK = """
import sys, torch
from pathlib import Path
import train.checkpoint.callback, train.checkpoint.published, stu.model_dir
from train.checkpoint import export
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
before, model, output = peak(), Path(sys.argv[1]), Path(sys.argv[2])
for layout in ("stu", "published"):
    export.export(model, output / layout, "bfloat16", layout=layout)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux' /proc")
def test_exports_hold_no_second_model(tmp_path, code_tokenizer):
    config = ModelConfig(vocab_size=280, width=512, num_layers=8, max_seq_len=64, layout="stu")
    save_model(tmp_path / "ours", FlashSTU(config), code_tokenizer)
    size = (tmp_path / "ours" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", PEAK, tmp_path / "ours", tmp_path / "out"]
    result = forked.run(*command, MALLOC_MMAP_THRESHOLD_="65536")
    # All of it is mapped; another in bfloat16 would be half as much again.
    assert int(result.stdout) < 1.2 * size
