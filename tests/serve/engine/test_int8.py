"""Weights of 8 bits against sums of whole numbers, and models with them against float ones."""

import pytest
import torch

from serve.config import EngineConfig
from serve.engine import int8
from serve.engine.engine import Engine
from serve.engine.inference_model import chosen_weights, inference_copy
from serve.engine.int8 import Int8GatedMLP, Int8Linear, has_int8
from serve.request import Request
from serve.sampling_params import SamplingParams
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.quantization import Quantized, dequantize, quantize
from tests.reference.int8 import int8_product

pytestmark = pytest.mark.skipif(not has_int8(), reason="torch has no FBGEMM here")


def build(layout="hybrid", **changes):
    torch.manual_seed(0)
    shape = {"width": 48, "num_layers": 2, "num_filters": 6, "num_heads": 2, "max_seq_len": 96}
    return FlashSTU(ModelConfig(vocab_size=300, layout=layout, **shape | changes)).eval()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def matrices(shape):
    """Return weights with outputs of very different sizes, of zeros, and of a single weight."""
    weight = torch.randn(shape) * torch.logspace(-20, 20, shape[0])[:, None]
    weight[0], weight[1, 1:] = 0, 0
    return weight


@pytest.mark.parametrize("shape", [(40, 64), (3, 1), (17, 33), (5, 4096)])
def test_a_weight_is_at_most_half_a_scale_from_its_number(shape):
    weight = matrices(shape)
    values, scales = quantize(weight)
    assert values.dtype == torch.int8
    assert values.abs().amax(1)[1:].eq(127).all(), "all of the range is used"
    error = (dequantize(Quantized(values, scales)) - weight).abs()
    assert (error <= 0.5001 * scales[:, None]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_again_changes_nothing(dtype):
    once = quantize(torch.randn(60, 500))
    again = quantize(dequantize(once).to(dtype))
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    assert (again.values.int() - once.values).abs().max() <= (dtype == torch.bfloat16)
    assert (again.scales / once.scales - 1).abs().max() < tolerance


@pytest.mark.parametrize("levels", [127, 63])
@pytest.mark.parametrize("num_rows", [1, 2, 8, 21, 64, 100])
@pytest.mark.parametrize("shape", [(48, 20), (7, 1), (33, 130)])
def test_products_are_those_of_whole_numbers(monkeypatch, levels, num_rows, shape):
    monkeypatch.setattr(int8, "LEVELS", levels)
    monkeypatch.setattr(int8, "ZERO", levels + 1)
    weight, x = matrices(shape), torch.randn(num_rows, 3, shape[1])
    x[0, 0] = 0
    expected = int8_product(x, weight, levels)
    error = Int8Linear(weight)(x).double() - expected
    assert (error.abs() <= 1e-6 * expected.abs().amax((0, 1)) + 1e-30).all()


def test_products_are_within_a_percent_of_float_ones():
    weight, x = torch.randn(200, 1000), torch.randn(30, 1000)
    expected = x.double() @ weight.double().T
    error = (Int8Linear(weight)(x) - expected).norm() / expected.norm()
    assert 0.001 < error < 0.012


def test_a_row_does_not_depend_on_the_others():
    linear, x = Int8Linear(torch.randn(40, 64)), torch.randn(300, 64)
    x[1::2] *= 1e6
    x[7] = torch.nan
    together = linear(x)
    for row in range(len(x)):
        assert torch.equal(linear(x[row : row + 1])[0], together[row]) or row == 7


def test_a_row_of_an_invariant_mlp_does_not_depend_on_how_threads_divide_the_batch():
    config = ModelConfig(50, width=16, num_layers=1, num_heads=2, mlp_ratio=2001)
    copied = inference_copy(FlashSTU(config), "int8", batch_invariant=True)
    mlp, x = copied.blocks[0].mlp, 20 * torch.randn(8, 16)
    assert isinstance(mlp, Int8GatedMLP)
    mlp.down = torch.nn.Identity()  # it would round most differences away
    torch.set_num_threads(3)
    together, alone = mlp(x), [mlp(row[None])[0] for row in x]
    torch.set_num_threads(1)
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(damage):
    x = torch.randn(3, 16)
    x[1, 2] = damage
    products = Int8Linear(torch.randn(8, 16))(x)
    assert products.isfinite().all(1).tolist() == [True, False, True]
    weight = torch.randn(8, 16)
    weight[5, 1] = damage
    assert not Int8Linear(weight)(torch.ones(2, 16))[:, 5].isfinite().any()


@pytest.mark.parametrize("layout", ["hybrid", "hyena"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_nearly_the_same(layout, dtype):
    model = build(layout).to(dtype)
    copied = inference_copy(model, "int8")
    tokens = torch.arange(30)[None]
    with torch.inference_mode():
        expected = model(tokens).float()
        error = (copied(tokens).float() - expected).norm() / expected.norm()
    assert copied(tokens).dtype == dtype
    assert 0.005 < error < 0.05, "about 1% of each product, in seven to ten after one another"
    assert copied.embedding.weight is model.embedding.weight
    float_names = {name for name, _ in copied.named_parameters()}
    assert not float_names & model.matrices.keys(), "none is left in float"


def test_an_engine_decodes_each_request_as_alone(code_model, code_tokenizer):
    """With batch_invariant, even log probabilities are the same to the last bit."""
    params = SamplingParams(max_new_tokens=20, temperature=1.0, logprobs=2)
    requests = [Request(ids, params) for ids in ([5, 6, 7], [9] * 11, [3])]

    def decode(requests):
        config = EngineConfig(cache_gib=0.05, weights="int8", batch_invariant=True)
        engine = Engine(code_model, code_tokenizer, config)
        ids = [engine.add(request) for request in requests]
        found = {request_id: [] for request_id in ids}
        while engine.has_work:
            for output in engine.step():
                found[output.request_id] += output.logprobs
        return [found[request_id] for request_id in ids]

    assert decode(requests) == [decode([request])[0] for request in requests]


def test_models_stored_in_8_bits_decode_in_floats_elsewhere(caplog):
    model = build()
    assert chosen_weights(None, model) == "float"
    model.weights = "int8"
    assert chosen_weights(None, model) == "int8"
    assert chosen_weights("float", model) == "float"
    elsewhere = build().to("meta")
    elsewhere.weights = "int8"
    assert chosen_weights(None, elsewhere) == "float"
    assert "decoded as floats here" in caplog.text


def test_int8_is_refused_where_it_is_not_to_be_had():
    with pytest.raises(UserError, match="8 bits run on CUDA"):
        inference_copy(build().to("meta"), "int8")
    with pytest.raises(UserError, match="weights"):
        EngineConfig(weights="int4")
