"""Hyena against its formulas; the dtype and initialisation of its filters."""

import pytest
import torch

from stu.config import ModelConfig
from stu.convolution import after_zeros, causal_convolution, short_convolution
from stu.model import FlashSTU
from stu.sequences.base import WHOLE
from tests.reference import hyena as reference

FILTER = "input_matrix", "hidden_matrices", "biases", "frequencies", "output_matrix", "skip"
SMALL = {"vocab_size": 50, "width": 12, "num_layers": 2, "num_heads": 4, "mlp_ratio": 2}


def build(max_seq_len=64, **changes):
    torch.manual_seed(0)
    settings = SMALL | {"layout": "hyena", "max_seq_len": max_seq_len} | changes
    return FlashSTU(ModelConfig(**settings))


def layer(max_seq_len=64, **changes):
    """Return a float64 layer with random weights and biases, and the filters of its model."""
    model = build(max_seq_len, **changes).double()
    mixer = model.blocks[0].mixer
    torch.nn.init.normal_(mixer.filter.biases, std=0.02)
    torch.nn.init.normal_(mixer.filter.frequencies, mean=14)
    return mixer, model.filters


@pytest.mark.parametrize(
    ("length", "max_seq_len"),
    [(1, 1), (1, 2), (2, 2), (1, 64), (2, 64), (3, 64), (33, 64), (64, 64)],
)
@pytest.mark.parametrize("width", [12, 1])
def test_hyena_equals_reference(length, max_seq_len, width):
    hyena, filters = layer(max_seq_len, width=width, num_heads=1)
    x = torch.randn(2, length, width, dtype=torch.float64)
    weights = {name: weight.detach().numpy() for name, weight in hyena.named_parameters()}
    expected = torch.from_numpy(reference.hyena(x.numpy(), weights, max_seq_len))
    actual = hyena(x, filters, WHOLE)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert actual.std() > 1e-3 or actual.numel() == 1


def test_taps_of_the_first_lags_are_those_of_all():
    hyena, filters = layer()
    assert filters.shape == (64, 0)
    taps = hyena.taps(filters)
    torch.testing.assert_close(hyena.taps(filters[:5]), taps[:5], rtol=0, atol=1e-15)


def test_float32_taps_of_a_long_context():
    """Computed in float32 alone, angles of up to a hundred would have errors of 1e-5."""
    hyena, filters = layer(16_384)
    exact = hyena.taps(filters)
    single = hyena.float().taps(filters.float())
    assert single.dtype == torch.float32
    assert (single - exact)[1:].abs().max() < 2e-6 * exact[1:].abs().max()


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7])
def test_short_convolution_continues_after_earlier_inputs(length):
    x, taps = torch.randn(2, 7, 5).double(), torch.randn(3, 5).double()
    whole = short_convolution(after_zeros(x, len(taps)), taps)
    torch.testing.assert_close(whole, causal_convolution(x, taps), rtol=0, atol=1e-14)
    before = torch.cat([torch.zeros(2, 2, 5).double(), x[:, :length]], dim=1)[:, -2:]
    assert torch.equal(
        short_convolution(torch.cat([before, x[:, length:]], dim=1), taps), whole[:, length:]
    )


def test_casts_do_not_change_the_filters():
    model = build()
    hyena = model.blocks[0].mixer
    taps = hyena.taps(model.filters)
    assert taps.dtype == torch.float32
    model.bfloat16()
    assert hyena.input.weight.dtype == hyena.short_taps.dtype == torch.bfloat16
    assert torch.equal(hyena.taps(model.filters), taps)
    assert model(torch.zeros(1, 5, dtype=torch.long)).dtype == torch.bfloat16
    names = {"filters", *(f"blocks.{i}.mixer.filter.{name}" for i in (0, 1) for name in FILTER)}
    assert model.wide_names == names
    state = model.state_dict()
    wide = {name for name, tensor in state.items() if tensor.dtype == torch.float32}
    assert wide == names
    taps = hyena.taps(model.double().filters)
    assert taps.dtype == torch.float64


def test_taps_of_16_bit_weights_are_computed_in_float32():
    """DeepSpeed and FSDP may cast every weight."""
    model = build()
    hyena = model.blocks[0].mixer
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    rounded = hyena.taps(model.filters)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    exact = hyena.taps(model.filters.double())
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 1e-5 * exact.abs().max()


def test_initial_weights():
    """As published, with this stack's scale of projections that end a residual branch."""
    model = build(width=256, num_heads=1, num_layers=6)
    hyena = model.blocks[3].mixer
    for weight, std in [
        (hyena.input.weight, (2 / (4 * 256)) ** 0.5),
        (hyena.output.weight, 256**-0.5 * 12**-0.5),
        (hyena.short_taps, 1 / 3),
        (hyena.filter.input_matrix, 0.02),
        (hyena.filter.hidden_matrices, 0.02),
        (hyena.filter.output_matrix, 0.02),
        (hyena.filter.skip, 1),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert hyena.short_taps.abs().max() <= 3**-0.5
    assert hyena.filter.frequencies.unique().tolist() == [14]
    assert hyena.filter.biases.unique().tolist() == [0]
    window = hyena.taps(model.filters)[1:].abs()
    slow, fast = window[:, 0], window[:, -1]
    assert slow[40:].max() > 20 * fast[40:].max()


@pytest.mark.parametrize("layout", ["attention", "hyena"])
def test_parameters_are_counted(layout):
    """A mixer has four projections; Hyena also has three taps for each of three projections, four
    layers that make its filters, and the skip term."""
    mixer = 4 * 12**2
    if layout == "hyena":
        mixer += 9 * 12 + 33 * 64 + 2 * 64 * 64 + 3 * 64 + 64 + 64 * 12 + 12
    block = mixer + 3 * 2 * 12 * 12 + 2 * 12
    model = build(layout=layout)
    assert model.num_parameters() == 50 * 12 + 2 * block + 12
    assert model.filters.numel() == 0
