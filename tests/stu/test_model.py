"""The model: forms of STU, causality, casts, initial weights."""

import itertools
import subprocess
import sys

import pytest
import torch

from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.convolution import causal_convolution
from stu.layers import GatedMLP, RMSNorm
from stu.model import FlashSTU
from stu.sequences.base import WHOLE
from stu.stu_mixer import FullSTU, TensordotSTU
from tests.reference import convolution as reference

SMALL = {"vocab_size": 50, "width": 16, "num_layers": 4, "num_heads": 4, "mlp_ratio": 2}
SMALL |= {"max_seq_len": 64, "num_filters": 5, "window_tokens": 7}


def small(**changes):
    torch.manual_seed(0)
    return FlashSTU(ModelConfig(**(SMALL | changes)))


def stu_layer(form, layout="stu"):
    model = small(stu_form=form, layout=layout).double()
    return model.blocks[0].mixer, model.filters


@pytest.mark.parametrize("length", [1, 2, 33, 64])
@pytest.mark.parametrize(
    ("form", "kind", "by_branches", "matrices"),
    [
        ("tensordot", TensordotSTU, reference.stu_tensordot, ("input_matrix", "filter_matrix")),
        ("full", FullSTU, reference.stu_full, ("plus_matrices", "minus_matrices")),
    ],
)
def test_each_form_equals_plus_and_minus_branches(form, kind, by_branches, matrices, length):
    stu, filters = stu_layer(form)
    assert isinstance(stu, kind)
    x = torch.randn(2, length, 16, dtype=torch.float64)
    tensors = (x, filters, *(getattr(stu, name) for name in matrices))
    expected = torch.from_numpy(by_branches(*(t.detach().numpy() for t in tensors)))
    torch.testing.assert_close(stu(x, filters, WHOLE), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("layout", "form"), [("stu", "tensordot"), ("stu", "full"), ("hyena", "tensordot")]
)
def test_gradcheck(layout, form):
    stu, filters = stu_layer(form, layout)
    x = torch.randn(1, 4, 16, dtype=torch.float64, requires_grad=True)
    names = dict(stu.named_parameters())
    # A random direction in the parameters: all entries one by one would take minutes.
    directions = [torch.randn_like(p) for p in names.values()]

    def along(x, *amounts):
        moved = {
            n: p + a * d for (n, p), a, d in zip(names.items(), amounts, directions, strict=True)
        }
        return torch.func.functional_call(stu, moved, (x, filters, WHOLE))

    amounts = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in names]
    assert torch.autograd.gradcheck(along, (x, *amounts))


@pytest.mark.parametrize(
    ("layout", "form"),
    [
        *itertools.product(["stu", "hybrid"], ["tensordot", "full"]),
        ("hyena", "tensordot"),
        ("attention", "tensordot"),
    ],
)
def test_outputs_do_not_depend_on_later_tokens(layout, form):
    model = small(layout=layout, stu_form=form).double()
    tokens = torch.randint(50, (1, 40))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=1e-12)
    assert (before[:, 20:] - after[:, 20:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("layout", ["hybrid", "hyena", "attention"])
def test_lengths_up_to_max_seq_len_are_accepted(layout):
    model = small(layout=layout)
    for length in (1, 3, 64):
        assert model(torch.zeros(1, length, dtype=torch.long)).shape == (1, length, 50)
    with pytest.raises(UserError, match="65 tokens exceeds max_seq_len=64"):
        model(torch.zeros(1, 65, dtype=torch.long))


def test_filters_survive_a_cast_to_bfloat16():
    model = small()
    filters = model.filters.clone()
    model.bfloat16()
    assert model.filters.dtype == torch.float32
    assert torch.equal(model.filters, filters)
    assert model.blocks[0].mixer.filter_matrix.dtype == torch.bfloat16
    assert model(torch.zeros(1, 5, dtype=torch.long)).dtype == torch.bfloat16
    assert model.double().filters.dtype == torch.float64


@pytest.mark.parametrize("layout", ["stu", "hyena"])
def test_taps_are_float32_under_autocast(layout):
    model = small(layout=layout)
    mixer = model.blocks[0].mixer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        taps = mixer.taps(model.filters)
        x = torch.randn(1, 20, 16)
        mixed = mixer(x, model.filters, WHOLE)
        projected = x @ mixer.input_matrix if layout == "stu" else None
    assert torch.equal(taps, mixer.taps(model.filters))
    assert mixed.dtype == torch.bfloat16  # as autocast wants its matrix products
    if projected is None:
        return
    assert projected.dtype == torch.bfloat16
    expected = causal_convolution(projected.float(), taps, 2)
    assert torch.equal(mixed, expected.bfloat16())  # rounded once, after the convolution


@pytest.mark.parametrize("layout", ["hybrid", "hyena"])
def test_float32_forward_stays_near_float64(layout):
    model = small(layout=layout)
    tokens = torch.randint(50, (2, 64))
    single = model(tokens)
    exact = model.double()(tokens)
    assert (single - exact).abs().max() < 1e-5 * exact.abs().max()


def test_norm_and_mlp_equal_their_formulas():
    torch.manual_seed(0)
    x = torch.randn(3, 8, dtype=torch.float64)
    norm = RMSNorm(8, 1e-5).double()
    torch.nn.init.normal_(norm.weight)
    expected = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * norm.weight
    torch.testing.assert_close(norm(x), expected)
    mlp = GatedMLP(ModelConfig(vocab_size=1, width=8, mlp_ratio=3)).double()
    gate, up, down = (layer.weight for layer in (mlp.gate, mlp.up, mlp.down))
    g = x @ gate.T
    gelu = 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)))
    torch.testing.assert_close(mlp(x), (gelu * (x @ up.T)) @ down.T)


def test_initial_weights():
    """Stds as stated, output projections scaled once: the published code shrinks them per layer."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=3000, width=128, num_layers=6, mlp_ratio=4, num_filters=24)
    model = FlashSTU(config)
    std, scale = 128**-0.5, 12**-0.5

    def check(weight, expected):
        assert weight.std().item() == pytest.approx(expected, rel=0.05)

    check(model.embedding.weight, std)
    for block in model.blocks:
        check(block.mlp.gate.weight, std)
        check(block.mlp.up.weight, std)
        check(block.mlp.down.weight, std * scale)
    stu, attention = model.blocks[4].mixer, model.blocks[5].mixer
    check(stu.input_matrix, 128**-0.5)
    check(stu.filter_matrix, (2 / (24 + 128)) ** 0.5)
    check(attention.qkv.weight, (2 / (128 + 384)) ** 0.5)
    check(attention.output.weight, 128**-0.5 * scale)
    # A fresh model knows nothing: its loss is that of a uniform guess, to within its noise.
    tokens = torch.randint(3000, (4, 65))
    logits = model(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(8.006 + 0.5, abs=0.2)  # ln 3000, and half a unit variance


def test_meta_device_costs_no_filters():
    with torch.device("meta"):
        model = FlashSTU(ModelConfig(vocab_size=200064, width=1024, max_seq_len=2**20))
    assert model.filters.is_meta


def test_the_library_does_not_import_the_compiler():
    """It takes a second, which every replica of a server would wait for."""
    code = "import sys, stu.model, serve.engine.engine; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
