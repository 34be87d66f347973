"""Kernels, and their twins in torch, compute what the formulas say.

Kernels run on a CUDA device, or in Triton's interpreter, for which `test_interpreter.py` starts a
process of its own. What may not be read is NaN, and what may not be written stays as it was.
"""

import math
import os

import numpy as np
import pytest
import torch

from serve.kernels import (
    alternating_field,
    dispatch,
    gated,
    narrow_product,
    near_field,
    norm,
    page_end,
    window_attention,
)
from stu.attention import Scores, alibi_slopes
from stu.layers import RMSNorm
from stu.quantization import quantize
from tests.reference import kernels as reference

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
HAS_CUDA = torch.cuda.is_available()
RUNS = [
    "torch",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            not dispatch.HAS_TRITON or not (HAS_CUDA or INTERPRETS),
            reason="needs a CUDA device, or TRITON_INTERPRET=1",
        ),
    ),
]
HALF = (torch.float16, 1e-3) if INTERPRETS else (torch.bfloat16, 4e-3)
"""The interpreter does not round to bfloat16, but cuts digits off."""
DTYPES = {torch.float32: 2e-6, torch.float64: 1e-13, HALF[0]: HALF[1]}
"""Types of activations, and the largest error relative to the largest number."""
pytestmark = pytest.mark.parametrize("run", RUNS)


def implementation(module, name, run):
    return getattr(module, f"{run}_{name}")


def device(run):
    return "cuda" if run == "triton" and HAS_CUDA else "cpu"


def cache_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


def assert_close(found, expected, dtype):
    assert found.dtype == dtype
    found, expected = found.detach().cpu().double(), torch.as_tensor(expected).double()
    largest = expected.abs().max()
    assert (found - expected).abs().max() <= DTYPES[dtype] * largest


def page_tensor(rows, layers, signals, slots, channels, dtype):
    """Return NaN `[rows, layers, signals, slots, C]` with rows next to each other in memory."""
    made = torch.full((layers, signals, slots, rows, channels), math.nan, dtype=dtype)
    return made.permute(3, 0, 1, 2, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("signals", "slots", "channels", "place"),
    [(2, 4, 37, 5), (2, 1, 3, 1), (1, 8, 130, 7), (2, 16, 64, 0), (2, 32, 5, 63), (1, 64, 3, 17)],
)
def test_near_field(run, dtype, signals, slots, channels, place):
    torch.manual_seed(place)
    layers, layer, rows, own = 3, 1, 6, [4, 0, 5]
    slot, signal = divmod(place, signals)
    wide = cache_dtype(dtype)
    inputs, pending = (page_tensor(rows, layers, signals, slots, channels, wide) for _ in "ab")
    for row in own:
        inputs[row, layer, signal, :slot] = torch.randn(slot, channels, dtype=wide)
        pending[row, layer, signal, slot] = torch.randn(channels, dtype=wide)
    near = torch.randn(layers, slots, channels, dtype=wide)
    x = torch.randn(len(own), 2 * channels).to(dtype)[:, :channels]  # rows are not contiguous
    expected = [
        reference.near_field(
            inputs[row, layer, signal].double().numpy(),
            pending[row, layer, signal].double().numpy(),
            near[layer].double().numpy(),
            slot,
            new.double().numpy(),
        )
        for row, new in zip(own, x, strict=True)
    ]
    written = inputs.clone()
    written[own, layer, signal, slot] = x.to(wide)
    moved = [tensor.to(device(run)) for tensor in (inputs, pending, near)]
    tokens = (tensor.to(device(run)) for tensor in (torch.tensor(own), torch.tensor([place]), x))
    found = implementation(near_field, "near_field", run)(*moved, layer, *tokens)
    assert_close(found, np.stack(expected), dtype)
    torch.testing.assert_close(moved[0].cpu(), written, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("slots", "filters", "coordinates", "streams", "place"),
    [(8, 3, 5, 37, 6), (1, 1, 1, 1, 0), (6, 4, 7, 130, 5)],
)
def test_alternating_field(run, dtype, slots, filters, coordinates, streams, place):
    torch.manual_seed(place)
    layers, layer, rows, own = 3, 1, 6, [4, 0, 5]
    wide = cache_dtype(dtype)
    inputs = page_tensor(rows, layers, 2, slots, streams, wide)
    narrow = torch.full((rows, layers, 2, coordinates, streams), math.nan, dtype=wide)
    signs = torch.tensor([1.0, -1.0], dtype=wide).repeat(-(-slots // 2))[:slots, None]
    for row in own:
        inputs[row, layer, 0, :place] = torch.randn(place, streams, dtype=wide)
        inputs[row, layer, 1, :place] = (signs * inputs[row, layer, 0])[:place]
        narrow[row, layer] = torch.randn(2, coordinates, streams, dtype=wide)
    reach = torch.randn(slots, filters, coordinates, dtype=wide)
    taps = torch.randn(slots, filters, dtype=wide)
    near = torch.zeros(slots, filters, slots, dtype=wide)
    for now in range(slots):
        near[now, :, : now + 1] = taps[: now + 1].flip(0).T
    ages = torch.tensor([[0, -9], [place + 5, -9], [place // 2, -9]])[:, 0]
    x = torch.randn(len(own), 2 * streams).to(dtype)[:, ::2]  # none of these is dense
    expected = [
        reference.alternating_field(
            inputs[row, layer, 0].double().numpy(),
            narrow[row, layer].double().numpy(),
            reach.double().numpy(),
            taps.double().numpy(),
            place,
            min(place, int(age)),
            new.double().numpy(),
        )
        for row, age, new in zip(own, ages, x, strict=True)
    ]
    written = inputs.clone()
    written[own, layer, 0, place] = x.to(wide)
    written[own, layer, 1, place] = x.to(wide) * (-1) ** place
    moved = [tensor.to(device(run)) for tensor in (inputs, narrow, reach, near)]
    numbers = torch.tensor(own), torch.tensor([place]), ages, x
    tokens = (tensor.to(device(run)) for tensor in numbers)
    found = implementation(alternating_field, "alternating_field", run)(*moved, layer, *tokens)
    assert_close(found, np.stack(expected).reshape(len(own) * streams, 2 * filters), dtype)
    torch.testing.assert_close(moved[0].cpu(), written, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("signals", "slots", "channels", "rank"), [(2, 4, 37, 5), (2, 1, 3, 2), (1, 8, 65, 36)]
)
@pytest.mark.parametrize("ending", [[1], [3, 0], [-1, 2], [-1]])
def test_page_end(run, dtype, signals, slots, channels, rank, ending):
    torch.manual_seed(rank)
    layers, rows, own = 4, 5, [4, 0, 2]
    shape = rows, layers, signals
    states = torch.full((*shape, rank, channels), math.nan, dtype=torch.float64)
    inputs, pending = (page_tensor(*shape, slots, channels, dtype) for _ in "ab")
    rates = torch.linspace(0.05, 2, rank, dtype=torch.float64)
    decays = torch.exp(-rates * torch.arange(slots + 1)[:, None])
    decays = torch.cat([decays, torch.full((3, rank), math.nan)])
    coefficients = torch.full((layers, rank, channels), math.nan, dtype=torch.float64)
    joined_at = torch.randint(1, signals * slots + 1, (rows, layers)) % (signals * slots)
    for layer in filter(lambda number: number >= 0, ending):
        states[own, layer] = torch.randn(len(own), signals, rank, channels, dtype=torch.float64)
        inputs[own, layer] = torch.randn(len(own), signals, slots, channels, dtype=dtype)
        coefficients[layer] = torch.randn(rank, channels)
        for row in own:
            for place in range(joined_at[row, layer]):
                inputs[row, layer, place % signals, place // signals] = 0
    expected = [tensor.clone() for tensor in (states, pending, joined_at)]
    for layer in filter(lambda number: number >= 0, ending):
        for row in own:
            for signal in range(signals):
                joined = int(joined_at[row, layer])
                slot = len(range(signal, joined, signals))  # slots before it joined
                state, outputs = reference.page_end(
                    states[row, layer, signal].numpy(),
                    inputs[row, layer, signal, slot:].double().numpy(),
                    rates.numpy(),
                    coefficients[layer].numpy(),
                    slots,
                )
                expected[0][row, layer, signal] = torch.from_numpy(state)
                expected[1][row, layer, signal] = torch.from_numpy(outputs)
            expected[2][row, layer] = 0
    moved = [tensor.to(device(run)) for tensor in (states, inputs, pending, decays, coefficients)]
    numbers = [torch.tensor(ending).to(device(run)), torch.tensor(own).to(device(run))]
    joined_at = joined_at.to(device(run))
    implementation(page_end, "page_end", run)(*moved, joined_at, *numbers)
    for found, wanted in zip((moved[0], moved[2], joined_at), expected, strict=True):
        tolerance = 2e-6 if found.dtype == torch.float32 else 1e-12
        torch.testing.assert_close(
            found.cpu(), wanted, rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("slots", "channels", "rank", "coordinates"), [(5, 37, 6, 4), (1, 3, 2, 2)]
)
def test_page_end_of_narrow_states(run, dtype, slots, channels, rank, coordinates):
    """Both signals have a slot for every place."""
    torch.manual_seed(rank)
    layers, rows, own, layer = 3, 4, [3, 0], 1
    states = torch.full((rows, layers, 2, rank, channels), math.nan, dtype=torch.float64)
    inputs = page_tensor(rows, layers, 2, slots, channels, dtype)
    narrow = torch.full((rows, layers, 2, coordinates, channels), math.nan, dtype=dtype)
    rates = torch.linspace(0.05, 2, rank, dtype=torch.float64)
    decays = torch.exp(-rates * torch.arange(slots + 1)[:, None])
    into_narrow = torch.randn(coordinates, rank, dtype=torch.float64)
    joined_at = torch.tensor([[slots // 2] * layers] * rows)
    states[own, layer] = torch.randn(len(own), 2, rank, channels, dtype=torch.float64)
    inputs[own, layer] = torch.randn(len(own), 2, slots, channels, dtype=dtype)
    inputs[own, layer, :, : slots // 2] = 0
    expected = [tensor.clone() for tensor in (states, narrow, joined_at)]
    for row in own:
        for signal in range(2):
            state, _ = reference.page_end(
                states[row, layer, signal].numpy(),
                inputs[row, layer, signal, slots // 2 :].double().numpy(),
                rates.numpy(),
                np.ones((rank, channels)),
                1,
            )
            expected[0][row, layer, signal] = torch.from_numpy(state)
            expected[1][row, layer, signal] = into_narrow @ torch.from_numpy(state)
        expected[2][row, layer] = 0
    moved = [tensor.to(device(run)) for tensor in (states, inputs, narrow, decays, into_narrow)]
    numbers = [torch.tensor([-1, layer]).to(device(run)), torch.tensor(own).to(device(run))]
    joined_at = joined_at.to(device(run))
    implementation(page_end, "page_end", run)(*moved, joined_at, *numbers)
    for found, wanted in zip((moved[0], moved[2], joined_at), expected, strict=True):
        tolerance = 2e-6 if found.dtype == torch.float32 else 1e-12
        torch.testing.assert_close(
            found.cpu(), wanted, rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 37, 513])
@pytest.mark.parametrize("adds", [True, False])
def test_add_norm(run, dtype, width, adds):
    torch.manual_seed(width)
    x, added = torch.randn(2, 3, 2 * width).to(dtype)[:, :, :width]
    x[0] *= 1e-3  # as small as eps
    added = added.contiguous()
    weight = torch.randn(width).to(dtype)
    total = x + added if adds else x
    expected = reference.norm(total.double().numpy(), weight.double().numpy(), 1e-5)
    args = (tensor.to(device(run)) for tensor in (x, added, weight))
    x, added, weight = args
    run_norm = implementation(norm, "add_norm", run)
    found, normed = run_norm(x, added if adds else None, weight, 1e-5)
    assert torch.equal(found.cpu(), total)
    for row, wanted in zip(normed, expected, strict=True):
        assert_close(row, wanted, dtype)


def test_norm_is_that_of_the_model(run):
    torch.manual_seed(0)
    dtype, tolerance = HALF
    x = torch.randn(5, 64, dtype=dtype)
    model = RMSNorm(64, 1e-5).to(dtype)
    model.weight.data = torch.randn(64).to(dtype)
    run_norm = implementation(norm, "add_norm", run)
    _, normed = run_norm(x.to(device(run)), None, model.weight.data.to(device(run)), 1e-5)
    torch.testing.assert_close(normed.cpu(), model(x).detach(), rtol=2 * tolerance, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 37, 1025])
def test_gated_product(run, dtype, hidden):
    torch.manual_seed(hidden)
    gate_up = (4 * torch.randn(3, 2 * hidden)).to(dtype)
    gate_up[0, 0], gate_up[1, 0] = -80, 80
    expected = reference.gated_product(gate_up.double().numpy())
    found = implementation(gated, "gated_product", run)(gate_up.to(device(run)))
    # Twice, as the gate is rounded before it is multiplied.
    torch.testing.assert_close(
        found.cpu().double(), torch.from_numpy(expected), rtol=2 * DTYPES[dtype], atol=DTYPES[dtype]
    )


WINDOWS = [
    # window_tokens, page_len, heads, head_dim, lengths of the sequences before the new token
    (5, 4, 3, 5, [0, 3, 4, 5, 9, 23]),
    (1, 2, 1, 1, [0, 1, 2, 7]),
    (40, 8, 2, 16, [7, 39, 40, 41, 100]),
    (130, 16, 2, 3, [1, 128, 129, 300]),  # two parts
    (300, 32, 1, 66, [0, 260, 299, 700]),  # longer parts, of which some are empty
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window_tokens", "page_len", "heads", "head_dim", "lengths"), WINDOWS)
def test_window_attention(
    run, dtype, window_tokens, page_len, heads, head_dim, lengths, monkeypatch
):
    torch.manual_seed(window_tokens)
    monkeypatch.setattr(window_attention, "MOST_PARTS", 2)
    softcap, layers, layer = 5.0, 2, 1
    num_pages = -(-window_tokens // page_len) + 1
    rows = torch.randperm(len(lengths) + 1)[: len(lengths)]
    shape = layers, 2, page_len, heads, head_dim
    free = torch.randperm(len(lengths) * num_pages).tolist()
    pool = torch.full((len(free), *shape), math.nan).to(dtype)
    tables = torch.full((len(lengths) + 1, num_pages), 10**6)
    firsts, befores = torch.full((2, len(lengths) + 1), -(10**6))
    sequences = torch.randn(len(lengths), 3, max(lengths) + 1, heads, head_dim).to(dtype)
    expected, new_places = [], []
    for row, length, sequence in zip(rows.tolist(), lengths, sequences, strict=True):
        befores[row], oldest = length, max(0, length - window_tokens)
        firsts[row] = oldest // page_len * page_len
        for index in range(oldest // page_len, length // page_len + 1):
            tables[row, index - oldest // page_len] = page = free.pop()
            for position in range(index * page_len, (index + 1) * page_len):
                if oldest <= position < length:
                    pool[page, layer, :, position % page_len] = sequence[1:, position]
        new_places.append((page, length % page_len))
        known = sequence[:, : length + 1].double().numpy()
        expected.append(reference.window_attention(*known, window_tokens, softcap))
    new = torch.stack([own[:, n] for own, n in zip(sequences, lengths, strict=True)], 1)
    written = pool.clone()
    for (page, place), keys, values in zip(new_places, *new[1:], strict=True):
        written[page, layer, 0, place], written[page, layer, 1, place] = keys, values
    pool, slopes, rows = (tensor.to(device(run)) for tensor in (pool, alibi_slopes(heads), rows))
    scores = Scores(slopes, window_tokens, softcap)
    windows = window_attention.RowWindows(
        *(tensor.to(device(run)) for tensor in (tables, firsts, befores))
    )
    found = implementation(window_attention, "window_attention", run)(
        pool, layer, windows, rows, *new.to(device(run)), scores
    )
    assert_close(found, np.stack(expected), dtype)
    torch.testing.assert_close(pool.cpu(), written, rtol=0, atol=0, equal_nan=True)


LAYOUTS = {
    "interleaved": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_of_a_row_may_lie_anywhere(run, layout):
    torch.manual_seed(0)
    arrange, place = LAYOUTS[layout], device(run)

    def compute(arrange):
        pages, pending, near = (tensor.to(place) for tensor in buffers)
        one, two, three = (arrange(own.flatten(1).to(place)) for own in x)
        wide = [arrange(own.to(place)) for own in x]
        run_field = implementation(near_field, "near_field", run)
        yield run_field(pages, pending, near, 0, rows, rows[1:], one), pages
        run_window = implementation(window_attention, "window_attention", run)
        yield run_window(pool.to(place), 0, windows, rows, *wide, scores), None
        run_product = implementation(narrow_product, "narrow_product", run)
        yield run_product(one, *weights), None
        yield implementation(norm, "add_norm", run)(one, two, near[0, 0], 1e-5)
        yield implementation(gated, "gated_product", run)(three), None

    x, pool = torch.randn(3, 2, 3, 4), torch.randn(2, 1, 2, 4, 3, 4)
    buffers = torch.randn(2, 1, 2, 4, 12), torch.randn(2, 1, 2, 4, 12), torch.randn(1, 4, 12)
    weights = [tensor.to(place) for tensor in quantize(torch.randn(5, 12))]
    rows = torch.arange(2).to(place)
    table = rows[:, None], torch.zeros_like(rows), rows + 1
    windows = window_attention.RowWindows(*table)
    scores = Scores(alibi_slopes(3).to(place), 5, 5.0)
    for found, expected in zip(compute(arrange), compute(lambda x: x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_padding_changes_no_other_row(run):
    """The null row, here 0, may occur several times."""
    torch.manual_seed(0)
    inputs, pending = (torch.randn(4, 1, 2, 4, 5) for _ in "ab")
    near, x = torch.randn(1, 4, 5), torch.randn(5, 5)
    padded, alone = torch.tensor([2, 0, 0, 3, 0]), torch.tensor([2, 3])
    found = []
    for rows in padded, alone:
        buffers = [tensor.clone().to(device(run)) for tensor in (inputs, pending, near)]
        new = x[[0, 3]] if len(rows) == 2 else x
        tokens = (tensor.to(device(run)) for tensor in (rows, torch.tensor([5]), new))
        outputs = implementation(near_field, "near_field", run)(*buffers, 0, *tokens)
        found.append((outputs[rows > 0], buffers[0][2:]))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    found = []
    decays = torch.rand(5, 3, dtype=torch.float64)
    states = torch.randn(4, 1, 2, 3, 5, dtype=torch.float64)
    coefficients = torch.randn(1, 3, 5, dtype=torch.float64)
    for rows in padded, alone:
        buffers = [
            tensor.clone().to(device(run))
            for tensor in (states, inputs, pending, decays, coefficients, torch.tensor([[3]] * 4))
        ]
        numbers = torch.tensor([0]).to(device(run)), rows.to(device(run))
        implementation(page_end, "page_end", run)(*buffers, *numbers)
        assert all(torch.isfinite(tensor).all() for tensor in buffers)
        found.append([buffers[which][2:] for which in (0, 2, 5)])
    torch.testing.assert_close(*found, rtol=0, atol=0)


PRODUCTS = [
    # format, rows, inputs, outputs
    ("int8", 1, 1, 1),
    ("fp8", 1, 300, 37),
    ("int8", 7, 37, 5),
    ("int8", 17, 129, 70),
    ("fp8", 3, 2100, 19),  # several programs share the inputs
    ("int8", 40, 1025, 33),
    ("int8", 256, 20, 66),
    ("fp8", 256, 20, 66),
    ("int8", 257, 20, 9),  # many rows
    ("fp8", 257, 20, 9),
]


@pytest.mark.parametrize("dtype", [torch.float32, HALF[0]])
@pytest.mark.parametrize(("weights", "rows", "inputs", "outputs"), PRODUCTS)
def test_narrow_product(run, dtype, weights, rows, inputs, outputs):
    torch.manual_seed(inputs)
    values, scales = quantize(torch.randn(outputs, inputs), weights)
    scales = scales * torch.logspace(-1, 1, outputs)
    x = torch.full((rows + 2, inputs + 3), math.nan, dtype=dtype)[1:-1, :inputs]
    x.copy_(torch.randn(rows, inputs))
    x[rows // 2] = math.nan  # which no other row sees
    expected = reference.narrow_product(*(t.double().numpy() for t in (x, values, scales)))
    args = (tensor.to(device(run)) for tensor in (x, values, scales))
    name = "triton_narrow_product" if rows <= 256 and run == "triton" else "narrow_product"
    found = getattr(narrow_product, name)(*args)
    assert found.dtype == dtype
    error = (found.cpu().double() - torch.from_numpy(expected)).abs()
    assert error[rows // 2].isnan().all()
    error[rows // 2] = 0
    largest = 3 * scales * values.double().norm(dim=1)  # about that of the row
    # Of many rows, weights are rounded once more.
    assert (error <= (3 if rows > 256 else 1) * DTYPES[dtype] * largest).all()
