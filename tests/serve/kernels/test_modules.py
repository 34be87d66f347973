"""Modules that run kernels equal the model's own."""

import contextlib

import pytest
import torch

from serve.config import EngineConfig
from serve.engine import inference_model
from serve.engine.engine import Engine
from serve.engine.inference_model import inference_copy
from serve.kernels.modules import KernelGatedMLP, KernelRMSNorm, NarrowLinear, kernel_mlp
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.layers import GatedMLP, RMSNorm
from stu.model import FlashSTU
from stu.model_dir import load_model, save_model
from tests.serve.requests import make_request


@pytest.mark.parametrize("shape", [(20,), (1, 20), (3, 5, 20)])
@torch.no_grad()
def test_modules_equal_the_models(shape):
    torch.manual_seed(0)
    mlp, norm = GatedMLP(ModelConfig(50, width=20, num_heads=4)).double(), RMSNorm(20, 1e-5)
    norm.weight.normal_()
    x = torch.randn(shape, dtype=torch.float64)
    expected = mlp(x), norm(x)
    fused = kernel_mlp(mlp)
    for found, wanted in zip((fused(x), KernelRMSNorm(norm)(x)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mlp(x), expected[0], rtol=1e-12, atol=1e-14)
    assert mlp.up.weight.untyped_storage().data_ptr() == storage(fused.gate_up.keywords["weight"])


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


@pytest.fixture
def engine_of(code_tokenizer, monkeypatch):
    """Make engines as on CUDA, whose modules run the kernels' twins here."""
    monkeypatch.setattr(inference_model, "packs", lambda _: False)
    monkeypatch.setattr(inference_model, "uses_triton", lambda _: True)
    monkeypatch.setattr(inference_model, "_require_fp8", lambda _: None)

    def make(model, weights=None):
        return Engine(model, code_tokenizer, EngineConfig(cache_gib=0.01, weights=weights))

    return make


@pytest.fixture
def model(code_tokenizer):
    torch.manual_seed(0)
    shape = {"width": 16, "num_layers": 2, "num_heads": 2, "mlp_ratio": 2, "num_filters": 4}
    vocab_size = code_tokenizer.vocab_size
    return FlashSTU(ModelConfig(vocab_size, max_seq_len=64, window_tokens=10, **shape)).eval()


def test_a_model_can_be_saved_after_an_engine_has_been_made(
    engine_of, model, code_tokenizer, tmp_path
):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = engine_of(model)
    assert any(isinstance(module, KernelGatedMLP) for module in engine._runner._model.modules())
    save_model(tmp_path / "model", model, code_tokenizer)
    loaded = load_model(tmp_path / "model").state_dict()
    assert loaded.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(loaded[name], tensor), name
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("layout", ["hybrid", "hyena"])
@pytest.mark.parametrize(("weights", "least", "most"), [("int8", 0.003, 0.03), ("fp8", 0.01, 0.1)])
def test_models_of_8_bits_compute_nearly_the_same(
    engine_of, code_tokenizer, tmp_path, layout, weights, least, most
):
    """Whether they are quantised as they are loaded, or by the engine."""
    torch.manual_seed(0)
    shape = {"width": 64, "num_layers": 2, "num_heads": 2, "num_filters": 4, "layout": layout}
    vocab_size = code_tokenizer.vocab_size
    model = FlashSTU(ModelConfig(vocab_size, max_seq_len=64, window_tokens=10, **shape)).eval()
    save_model(tmp_path / "model", model, code_tokenizer)
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        expected = model(tokens)
        copied = engine_of(model, weights)._runner._model
        found = copied(tokens)
        error = (found - expected).norm() / expected.norm()
        assert least < error < most
        loaded = load_model(tmp_path / "model", weights=weights)
        assert torch.equal(engine_of(loaded)._runner._model(tokens), found), "by default"
        torch.testing.assert_close(loaded(tokens), found, rtol=1e-4, atol=1e-4)
    names = {name for name, _ in copied.named_parameters()}
    assert not names & model.matrices.keys(), "none is left in float"


def test_stored_weights_of_8_bits_are_in_memory_once(engine_of, model, code_tokenizer, tmp_path):
    save_model(tmp_path / "model", model, code_tokenizer, weights="int8")
    loaded = load_model(tmp_path / "model", dtype=torch.bfloat16, weights=None)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    copied = engine_of(loaded)._runner._model
    products = [module for module in copied.modules() if isinstance(module, NarrowLinear)]
    shared = {storage(module.values) for module in products}
    narrow = {name: tensor for name, tensor in loaded.state_dict().items() if "values" in name}
    assert {storage(tensor) for tensor in narrow.values()} == shared
    numbers = sum(model.get_parameter(name).numel() for name in model.matrices)
    assert sum(tensor.nbytes for tensor in narrow.values()) == numbers, "half of bfloat16"
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == (torch.int8 if name in narrow else before[name].dtype)
        assert torch.equal(tensor, before[name])
    assert all(module.scales.dtype == torch.float32 for module in products)


@pytest.mark.parametrize("weights", ["float", "int8", "fp8"])
def test_engines_of_one_model_share_its_weights(
    engine_of, model, code_tokenizer, tmp_path, weights
):
    save_model(tmp_path / "model", model, code_tokenizer)
    loaded = load_model(tmp_path / "model", weights=weights)
    mlp, x = loaded.blocks[0].mlp, torch.randn(3, 16)
    first, second = (engine_of(loaded, weights)._runner._model.blocks[0].mlp for _ in "ab")
    gate = mlp.gate.weight if weights == "float" else mlp.gate.values
    before = first(x)
    with torch.no_grad():
        gate.zero_()
    for own in (first, second):
        products = own.gate_up
        weight = products.keywords["weight"] if weights == "float" else products.values
        assert storage(weight) == storage(gate)
        assert not torch.equal(own(x), before)


@pytest.mark.parametrize(("stored", "wanted"), [("int8", "fp8"), ("fp8", "int8")])
def test_an_engine_of_another_format_of_8_bits_leaves_the_model_alone(
    engine_of, model, code_tokenizer, tmp_path, stored, wanted
):
    save_model(tmp_path / "model", model, code_tokenizer)
    loaded = load_model(tmp_path / "model", weights=stored)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    engine_of(loaded, wanted)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor.float(), before[name].float()), name


def test_8_bits_turn_back_into_floats(model, code_tokenizer, tmp_path):
    save_model(tmp_path / "model", model, code_tokenizer, weights="int8")
    narrow, wide = (load_model(tmp_path / "model", weights=own) for own in (None, "float"))
    tokens = torch.arange(30)[None]
    with torch.inference_mode():
        for inference in (lambda model: model, lambda model: inference_copy(model, "float")):
            torch.testing.assert_close(inference(narrow)(tokens), inference(wide)(tokens))
        assert narrow.double().blocks[0].mlp.gate.values.dtype == torch.int8
    with pytest.raises(UserError, match="cannot be saved"):
        save_model(tmp_path / "again", narrow, code_tokenizer)


@pytest.mark.parametrize(("capability", "is_refused"), [((8, 6), True), ((8, 9), False)])
def test_fp8_is_refused_where_there_are_no_such_floats(monkeypatch, model, capability, is_refused):
    with pytest.raises(UserError, match=r"fp8.*float on cpu.*8\.9 or above"):
        inference_copy(model, "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU X")
    expected = pytest.raises(UserError, match=r"8\.9 or above, and GPU X has 8\.6")
    with expected if is_refused else contextlib.nullcontext():
        inference_model._require_fp8(torch.device("cuda"))


def test_the_last_hidden_state_of_a_prompt_goes_through_the_norm(engine_of, model):
    """It is a vector without a batch."""
    engine, prompt = engine_of(model), [5, 9, 3, 7]
    engine.add(make_request(prompt, 0, pooling="last"))
    (output,) = engine.step()
    expected = model.hidden(torch.tensor([prompt]))[0, -1].detach()
    torch.testing.assert_close(torch.tensor(output.embedding), expected, rtol=1e-5, atol=1e-6)
