"""Packed weights against plain ones."""

import gc
import weakref

import pytest
import torch

from serve.cache.budget import make_caches
from serve.config import EngineConfig
from serve.engine.inference_model import inference_copy, inference_product
from serve.engine.int8 import Int8GatedMLP, has_int8
from serve.engine.packing import PackedGatedMLP, PackedLinear, has_bfloat16, packs
from serve.engine.runner import Runner
from stu.config import ModelConfig
from stu.layers import GatedMLP
from stu.model import FlashSTU

needs_packing = pytest.mark.skipif(
    not packs(torch.ones(1)), reason="torch was built without oneDNN here"
)

needs_bfloat16 = pytest.mark.skipif(not has_bfloat16(), reason="no products of bfloat16 here")
needs_int8 = pytest.mark.skipif(not has_int8(), reason="torch has no FBGEMM here")


def build(dtype=torch.float32, layout="hybrid"):
    torch.manual_seed(0)
    shape = {"width": 16, "num_layers": 2, "num_filters": 6, "num_heads": 2, "max_seq_len": 64}
    return FlashSTU(ModelConfig(vocab_size=40, layout=layout, **shape)).to(dtype).eval()


@needs_packing
@pytest.mark.parametrize("usual_rows", [1, 32])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 21, 22, 64, 100, 256])
def test_packed_products_equal_plain_ones(num_rows, usual_rows):
    weight, x = torch.randn(48, 20), torch.randn(num_rows, 3, 20)
    expected = x.double() @ weight.double().T
    for pack in (PackedLinear, inference_product):
        product = pack(weight, usual_rows=usual_rows)
        assert (product(x) - expected).abs().max() < 2e-6 * expected.abs().max()


@needs_bfloat16
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 21, 64, 300])
def test_packed_products_of_bfloat16_are_rounded_once(num_rows, gelu):
    weight, x = torch.randn(48, 500).bfloat16(), torch.randn(num_rows, 500).bfloat16()
    expected = x.double() @ weight.double().T
    if gelu:
        expected = torch.nn.functional.gelu(expected, approximate="tanh")
    found = PackedLinear(weight, gelu)(x)
    assert found.dtype == torch.bfloat16
    summed = 2e-6 * expected.abs().max()  # in float32
    assert ((found.double() - expected).abs() <= expected.abs() * 2**-8 + summed).all()


@needs_packing
def test_a_single_row_has_a_layout_of_its_own(monkeypatch):
    model, packed_for = build(), []
    reorder = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(
        "torch.ops.mkldnn._reorder_linear_weight",
        lambda weight, rows: packed_for.append(rows) or reorder(weight, rows),
    )
    for changed in ({}, {"max_running": 1}, {"max_running": 1, "batch_invariant": True}):
        packed_for.clear()
        config = EngineConfig(cache_gib=0.01, **{"max_running": 2, **changed})
        Runner(model, make_caches(model, config), config)
        assert set(packed_for) == {1 if changed == {"max_running": 1} else 32}


@pytest.mark.parametrize("num_rows", [255, 256, 257, 600])
@pytest.mark.parametrize(
    ("packed", "limit"),
    [
        pytest.param(PackedGatedMLP, 1e-6, marks=needs_packing),
        pytest.param(Int8GatedMLP, 0.05, marks=needs_int8),
    ],
)
def test_feed_forward_layers_compute_the_same_in_pieces(packed, limit, num_rows):
    torch.manual_seed(0)
    mlp = GatedMLP(ModelConfig(vocab_size=40, width=32, num_layers=1, mlp_ratio=2))
    x = torch.randn(1, num_rows, 32)
    with torch.inference_mode():
        expected = mlp.double()(x.double())
        found = packed(mlp.float())(x)
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1).mean()
    assert found.shape == x.shape
    assert errors.max() < limit


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
    is_packed = dtype == torch.float32 or (dtype == torch.bfloat16 and has_bfloat16())
    assert error <= {torch.float32: 1e-5, torch.float64: 0, torch.bfloat16: is_packed * 0.02}[dtype]
    assert copied.embedding.weight is model.embedding.weight
    assert copied.filters is model.filters
    packed = {name for name, module in copied.named_modules() if isinstance(module, PackedLinear)}
    mlps = {f"blocks.{i}.mlp.{name}" for i in (0, 1) for name in ("gate", "up", "down")}
    assert packed == (mixers | mlps if is_packed else set())
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
