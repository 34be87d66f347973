"""Model directories: whole or absent, and every damage named."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.model_dir import load_config, load_generation, load_model, load_tokenizer, save_model
from stu.quantization import quantize


@pytest.fixture(scope="module")
def model(code_tokenizer):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=code_tokenizer.vocab_size, width=16, num_layers=2, num_heads=2, max_seq_len=32
    )
    return FlashSTU(config)


@pytest.fixture
def saved(tmp_path, model, code_tokenizer):
    save_model(tmp_path / "model", model, code_tokenizer, {"temperature": 0.7})
    return tmp_path / "model"


def test_round_trip(saved, model, code_tokenizer):
    loaded = load_model(saved)
    tokens = torch.arange(10)[None]
    assert torch.equal(loaded(tokens), model(tokens))
    assert not loaded.training
    assert load_config(saved) == model.config
    assert load_tokenizer(saved).sha256 == code_tokenizer.sha256
    assert load_generation(saved)["temperature"] == 0.7
    assert load_generation(saved)["top_p"] == 1.0
    assert load_generation(saved)["max_new_tokens"] == 16  # half of what the model can hold
    assert len({(saved / name).stat().st_mode for name in os.listdir(saved)}) == 1
    files = {"config.json", "generation.json", "model.safetensors", "tokenizer.model"}
    assert {*os.listdir(saved)} == files


@pytest.mark.parametrize("layout", ["hyena", "attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_without_spectral_filters(tmp_path, code_tokenizer, layout, dtype):
    """A cast to 16 bits does not change the filters of Hyena."""
    torch.manual_seed(0)
    shape = {"width": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 32}
    model = FlashSTU(ModelConfig(vocab_size=code_tokenizer.vocab_size, layout=layout, **shape))
    save_model(tmp_path / "model", model, code_tokenizer, dtype=dtype)
    loaded = load_model(tmp_path / "model", dtype=dtype)
    assert loaded.embedding.weight.dtype == dtype
    assert loaded.filters.shape == (32, 0)
    assert torch.equal(loaded.convolution_taps()[0], model.convolution_taps()[0])
    tokens = torch.arange(10)[None]
    assert torch.equal(loaded(tokens), model.to(dtype)(tokens))


@pytest.mark.parametrize("layout", ["hybrid", "hyena"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_of_8_bits(tmp_path, code_tokenizer, layout, dtype):
    """They are stored once, and everything else as it is."""
    torch.manual_seed(0)
    shape = {"width": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 32}
    model = FlashSTU(ModelConfig(vocab_size=code_tokenizer.vocab_size, layout=layout, **shape))
    save_model(tmp_path / "model", model, code_tokenizer, weights="int8")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    loaded = load_model(tmp_path / "model", dtype=dtype)
    assert loaded.weights == "int8"
    assert len(model.matrices) == 10 if layout == "hyena" else 9
    for name, weight in model.state_dict().items():
        found = loaded.state_dict()[name]
        if name not in model.matrices:
            assert torch.equal(found, weight if name in model.wide_names else weight.to(dtype))
            continue
        by_output = weight.movedim(model.matrices[name], 0)
        values, scales = quantize(by_output)
        assert torch.equal(stored[name].movedim(model.matrices[name], 0), values)
        assert torch.equal(stored[f"{name}.scales"], scales)
        dequantized = (values * scales[:, None]).movedim(0, model.matrices[name])
        assert torch.equal(found, dequantized.to(dtype))
        assert found.is_contiguous()
    save_model(tmp_path / "again", loaded, code_tokenizer, weights="int8")
    again = load_file(tmp_path / "again" / "model.safetensors")
    changes = [(again[name].int() - stored[name]).abs().max() for name in model.matrices]
    assert max(changes) <= (dtype == torch.bfloat16)
    assert load_model(tmp_path / "again", dtype=None).norm.weight.dtype == dtype


def damaged_scales(weights):
    weights["blocks.0.mlp.up.weight.scales"] = torch.ones(5)


def float_matrix(weights):
    weights["blocks.0.mlp.up.weight"] = weights["blocks.0.mlp.up.weight"].float()


def lost_scales(weights):
    del weights["blocks.0.mlp.up.weight.scales"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_scales, r"mlp\.up\.weight\.scales \(torch\.float32, \(5,\)\) does not belong"),
        (float_matrix, "does not belong to blocks.0.mlp.up.weight"),
        (lost_scales, r"blocks\.0\.mlp\.up\.weight is torch\.int8"),
    ],
)
def test_matrices_and_scales_that_do_not_fit_are_refused(
    tmp_path, model, code_tokenizer, damage, message
):
    save_model(tmp_path / "model", model, code_tokenizer, weights="int8")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    damage(weights)
    save_file(weights, file, {"format": "stu", "format_version": "2"})
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "model")


def test_stored_filters_are_used(saved):
    """Two machines may differ in the last digits of their filters; the checkpoint decides."""
    file = saved / "model.safetensors"
    weights = load_file(file)
    weights["filters"] += 1
    save_file(weights, file, {"format": "stu", "format_version": "1"})
    assert torch.equal(load_model(saved).filters, weights["filters"])


def test_bfloat16_weights_keep_float32_filters(tmp_path, saved, code_tokenizer):
    loaded = load_model(saved, dtype=torch.bfloat16)
    assert loaded.embedding.weight.dtype == torch.bfloat16
    save_model(tmp_path / "half", loaded, code_tokenizer)
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert weights["filters"].dtype == torch.float32
    assert weights["embedding.weight"].dtype == torch.bfloat16


def test_existing_output_is_kept_without_overwrite(saved, model, code_tokenizer):
    before = (saved / "config.json").stat().st_ino
    with pytest.raises(UserError, match="exists and is not empty"):
        save_model(saved, model, code_tokenizer)
    assert (saved / "config.json").stat().st_ino == before
    save_model(saved, model, code_tokenizer, overwrite=True)
    assert (saved / "config.json").stat().st_ino != before
    assert os.listdir(saved.parent) == ["model"]


def test_tokenizer_of_another_size_is_refused(tmp_path, code_tokenizer):
    model = FlashSTU(ModelConfig(vocab_size=17, width=16, num_heads=2, max_seq_len=32))
    with pytest.raises(UserError, match=r"280 tokens and the model has vocab_size=17"):
        save_model(tmp_path / "model", model, code_tokenizer)
    assert os.listdir(tmp_path) == []


def test_truncated_weights_are_refused(saved):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file"):
            load_model(saved)


def of_another_model(weights):
    weights["extra"] = weights.pop("norm.weight")
    weights["embedding.weight"] = weights["embedding.weight"][:5].clone()


def with_filters_of(dtype):
    return lambda weights: weights.update(filters=weights["filters"].to(dtype))


OURS = {"format": "stu", "format_version": "1"}


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (dict, {**OURS, "format_version": "3"}, "version 3, .* reads up to 2: install a newer"),
        (dict, {"format": "pt"}, "not written by stu-export"),
        (dict, None, "not written by stu-export"),
        (of_another_model, OURS, r"norm\.weight is missing, extra is unknown, embedding"),
        (with_filters_of(torch.int32), OURS, "filters is torch.int32"),
        (with_filters_of(torch.bfloat16), OURS, "filters is torch.bfloat16"),
    ],
)
def test_other_formats_and_weights_are_refused(saved, change, metadata, message):
    file = saved / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata)
    with pytest.raises(UserError, match=message):
        load_model(saved)


def test_missing_and_damaged_files_are_named(saved, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*no such file; is .* a model directory"):
        load_model(tmp_path / "nowhere")
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"num_layer": 3}))
    with pytest.raises(UserError, match=r"config\.json: unknown model setting 'num_layer'"):
        load_model(saved)
    (saved / "config.json").write_text('{"vocab_size"')
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        load_model(saved)
