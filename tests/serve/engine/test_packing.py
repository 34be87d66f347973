"""Packed weights against plain ones."""

import gc
import weakref

import pytest
import torch

from serve.engine.inference_model import inference_copy, inference_product
from serve.engine.packing import PackedLinear, packs
from stu.config import ModelConfig
from stu.model import FlashSTU

needs_packing = pytest.mark.skipif(
    not packs(torch.ones(1)), reason="torch was built without oneDNN here"
)


def build(dtype=torch.float32, layout="hybrid"):
    torch.manual_seed(0)
    shape = {"width": 16, "num_layers": 2, "num_filters": 6, "num_heads": 2, "max_seq_len": 64}
    return FlashSTU(ModelConfig(vocab_size=40, layout=layout, **shape)).to(dtype).eval()


@needs_packing
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 21, 22, 64, 100, 256])
def test_packed_products_equal_plain_ones(num_rows):
    weight, x = torch.randn(48, 20), torch.randn(num_rows, 3, 20)
    expected = x.double() @ weight.double().T
    for product in (PackedLinear(weight), inference_product(weight)):
        assert (product(x) - expected).abs().max() < 2e-6 * expected.abs().max()


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "mixers"),
    [
        ("hybrid", {"blocks.0.mixer.project", "blocks.1.mixer.qkv", "blocks.1.mixer.output"}),
        ("hyena", {f"blocks.{i}.mixer.{name}" for i in (0, 1) for name in ("input", "output")}),
        ("attention", {f"blocks.{i}.mixer.{name}" for i in (0, 1) for name in ("qkv", "output")}),
    ],
)
def test_packed_copy_computes_the_same_and_shares_other_weights(dtype, layout, mixers):
    model = build(dtype, layout)
    copied = inference_copy(model)
    tokens = torch.arange(30)[None]
    with torch.inference_mode():
        expected = model(tokens)
        error = (copied(tokens) - expected).abs().max() / expected.abs().max()
    assert error <= (1e-5 if dtype == torch.float32 else 0)
    assert copied.embedding.weight is model.embedding.weight
    assert copied.filters is model.filters
    packed = {name for name, module in copied.named_modules() if isinstance(module, PackedLinear)}
    mlps = {f"blocks.{i}.mlp.{name}" for i in (0, 1) for name in ("gate", "up", "down")}
    assert packed == (mixers | mlps if dtype == torch.float32 else set())
    assert set(map(id, copied.parameters())) <= set(map(id, model.parameters()))


@needs_packing
def test_onednn_sees_few_different_numbers_of_rows(monkeypatch):
    """It keeps half a megabyte for each, and prompts have all lengths."""
    numbers = set()
    product = torch.ops.mkldnn._linear_pointwise

    class Recorded:
        _reorder_linear_weight = torch.ops.mkldnn._reorder_linear_weight

        @staticmethod
        def _linear_pointwise(x, *rest):
            numbers.add(len(x))
            return product(x, *rest)

    monkeypatch.setattr(torch.ops, "mkldnn", Recorded)
    linear = PackedLinear(torch.randn(8, 4))
    for num_rows in range(1, 600):
        assert linear(torch.ones(num_rows, 4)).shape == (num_rows, 8)
    assert numbers == {1, *range(8, 65, 8), 256}


@needs_packing
def test_packed_copy_keeps_no_plain_weights():
    model = build()
    copied = inference_copy(model)
    plain = weakref.ref(model.blocks[0].mlp.gate.weight)
    del model
    gc.collect()
    assert plain() is None
    assert copied.embedding.weight.shape == (40, 16)
