"""Modules that run kernels equal the model's own."""

import pytest
import torch

from serve.config import EngineConfig
from serve.engine import inference_model
from serve.engine.engine import Engine
from serve.kernels.modules import KernelGatedMLP, KernelRMSNorm
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
    fused = KernelGatedMLP(mlp)
    for found, wanted in zip((fused(x), KernelRMSNorm(norm)(x)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mlp(x), expected[0], rtol=1e-12, atol=1e-14)
    assert mlp.up.weight.untyped_storage().data_ptr() == fused.gate_up.data_ptr()


@pytest.fixture
def engine_of(code_tokenizer, monkeypatch):
    """Make engines as on CUDA, whose modules run the kernels' twins here."""
    monkeypatch.setattr(inference_model, "packs", lambda _: False)
    monkeypatch.setattr(inference_model, "uses_triton", lambda _: True)
    return lambda model: Engine(model, code_tokenizer, EngineConfig(cache_gib=0.01))


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


def test_the_last_hidden_state_of_a_prompt_goes_through_the_norm(engine_of, model):
    """It is a vector without a batch."""
    engine, prompt = engine_of(model), [5, 9, 3, 7]
    engine.add(make_request(prompt, 0, pooling="last"))
    (output,) = engine.step()
    expected = model.hidden(torch.tensor([prompt]))[0, -1].detach()
    torch.testing.assert_close(torch.tensor(output.embedding), expected, rtol=1e-5, atol=1e-6)
