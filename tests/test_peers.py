"""Peers of the decode benchmark: each decodes what its whole forward says, and counts right."""

import importlib.util

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import convolution_costs, costs
from benchmarks.flash_inference import FlashInference
from benchmarks.peers import PEERS, Peer, build_peers
from benchmarks.s4 import S4Model
from serve.cache.page_pool import PagePool
from serve.cache.paged_futurefill import ConvolutionCache
from stu.config import ModelConfig
from stu.futurefill import Continuous, Epoched
from stu.model import FlashSTU
from stu.online_convolution import Naive
from tests.reference import convolution as reference
from tests.reference import s4 as s4_reference

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(
    not HAS_TRANSFORMERS, reason="transformers is not installed: pip install 'stu[bench]'"
)
NAMES = [pytest.param(name, marks=[] if name == "s4" else [needs_transformers]) for name in PEERS]
SHAPE = ModelConfig(
    vocab_size=301, width=64, layout="stu", num_layers=6, num_heads=4, max_seq_len=256
)


def build(name: str, packed: bool = False) -> Peer:
    torch.manual_seed(0)
    num_parameters = FlashSTU(SHAPE).num_parameters()
    if packed:
        return build_peers([name], SHAPE, num_parameters)[name]
    return PEERS[name](SHAPE, num_parameters)


def whole_forward(name: str, peer: Peer, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of all tokens at once, without a cache; of S4 by convolution."""
    if name != "s4":
        return peer.model(tokens, use_cache=False).logits
    model = peer.model
    x = model.embedding(tokens)
    for block in model.blocks:
        u = block.mixer.input(block.mixer_norm(x))
        mixed = s4_reference.convolve(u.double().numpy(), *s4_parameters(block.mixer))
        x = x + torch.from_numpy(mixed).float()
        x = x + block.mlp(block.mlp_norm(x))
    return model.unembed(model.norm(x))


def s4_parameters(mixer):
    values = (
        mixer.decays(),
        torch.view_as_complex(mixer.outputs),
        mixer.log_time_steps.exp(),
        mixer.skip,
    )
    return [its.detach().numpy() for its in values]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_steps_equal_the_whole_forward(name, packed):
    peer = build(name, packed)
    torch.manual_seed(1)
    tokens = torch.randint(0, 301, (3, 21))
    whole = whole_forward(name, peer, tokens)
    peer.start(3, 21)
    torch.testing.assert_close(peer.prefill(tokens[:, :9]), whole[:, 8], rtol=1e-3, atol=1e-4)
    for position in range(9, 21):
        logits = peer.step(tokens[:, position])
        torch.testing.assert_close(logits, whole[:, position], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_sizes_and_dense_multiply_adds(name):
    peer = build(name)
    ours = FlashSTU(SHAPE).num_parameters()
    assert abs(peer.num_parameters / ours - 1) <= 0.05
    peer.start(2, 40)
    peer.prefill(torch.ones(2, 5, dtype=torch.long))
    peer.seek(30)
    with FlopCounterMode(display=False) as counter:
        assert peer.step(torch.tensor([1, 2])).shape == (2, 301)
    counts = counter.get_flop_counts()["Global"]
    products = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    costs_of_a_token = peer.costs(range(30, 31))
    assert products == 2 * 2 * costs_of_a_token.dense
    peer.pack()
    assert peer.costs(range(30, 31)) == costs_of_a_token


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_cache_bytes_are_what_is_allocated(name):
    peer = build(name)
    peer.start(2, 7)
    peer.prefill(torch.ones(2, 7, dtype=torch.long))
    if name == "s4":
        tensors = [peer._states]
    elif name == "rwkv":
        tensors = [*(its._state for its in peer._state[:2]), *peer._state[2:]]
    elif name == "mamba2":
        layers = peer._cache.layers
        tensors = [its.conv_states[0] for its in layers]
        tensors += [its.recurrent_states[0] for its in layers]
    else:
        tensors = [its for layer in peer._cache.layers for its in (layer.keys, layer.values)]
    held = sum(its.numel() * its.element_size() for its in tensors)
    assert held == peer.cache_bytes(2, 7)


class NoMixing:
    """A memory under which a token goes through the matrices alone."""

    def convolve(self, layer, streams):
        return streams

    def convolve_short(self, layer, inputs, taps):
        return inputs

    def attend(self, layer, queries, keys, values):
        return queries


@pytest.mark.parametrize("layout", ["stu", "hybrid", "hyena"])
@torch.no_grad()
def test_our_dense_multiply_adds(layout):
    config = ModelConfig(vocab_size=301, width=64, layout=layout, num_layers=4, max_seq_len=64)
    model = FlashSTU(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(3, 1, dtype=torch.long), NoMixing())
    assert counter.get_total_flops() == 2 * 3 * costs.dense_multiply_adds(config)


def test_a_peer_that_cannot_be_of_that_size_is_refused():
    with pytest.raises(ValueError, match="S4 comes to"):
        PEERS["s4"](SHAPE, 10_000)  # less than its embedding


@torch.no_grad()
def test_missing_transformers_is_said_how_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'stu\[peers\]'"):
        build_peers(["llama", "s4"], SHAPE, 1)


@torch.no_grad()
def test_s4_recurrence_equals_its_convolution():
    torch.manual_seed(0)
    mixer = S4Model(SHAPE, 8).blocks[0].mixer
    inputs = torch.randn(2, 50, 64)
    kept, outputs = mixer.discretized()
    state = torch.zeros(2, 64, kept.shape[1], dtype=torch.complex64)
    stepped = []
    for u in inputs.unbind(1):
        state = state * kept + u[..., None]
        stepped.append((torch.view_as_real(state).flatten(2) * outputs).sum(-1) + mixer.skip * u)
    expected = s4_reference.convolve(inputs.double().numpy(), *s4_parameters(mixer))
    np.testing.assert_allclose(torch.stack(stepped, 1), expected, atol=2e-5)


def decode(online, inputs, prompt_lengths):
    """Right-aligned prompts row by row, then steps; outputs where there are any."""
    layers, batch, length, _ = inputs.shape
    prompt = max(prompt_lengths)
    outputs = torch.zeros_like(inputs)
    for layer in range(layers):
        for row in range(batch):
            rows, its = slice(row, row + 1), slice(prompt - prompt_lengths[row], prompt)
            outputs[layer, rows, its] = online.prefill(layer, inputs[layer, rows, its], rows)
    for position in range(prompt, length):
        for layer in range(layers):
            outputs[layer, :, position] = online.step(layer, inputs[layer, :, position])
        online.advance()
    return outputs


@pytest.mark.parametrize("lag_step", [1, 2])
@pytest.mark.parametrize("page_columns", [1, 4, 32])
@pytest.mark.parametrize("prompt", [1, 2, 7, 31, 32, 64, 97])
@pytest.mark.parametrize("new", [1, 5, 70])
def test_flash_inference_equals_the_direct_sum(lag_step, page_columns, prompt, new):
    torch.manual_seed(0)
    num_taps = max(1, (prompt + new) // lag_step - prompt % 5)
    taps = torch.randn(2, num_taps, 3, dtype=torch.float64)
    inputs = torch.randn(2, 2, prompt + new, 3, dtype=torch.float64)
    lengths = [prompt, max(1, prompt - 3)]
    inputs[:, 1, : prompt - lengths[1]] = 0
    online = FlashInference(taps, 2, new, lag_step, page_columns, prompt)
    outputs = decode(online, inputs, lengths)
    for layer in range(2):
        filters = reference.spread(taps[layer].numpy(), lag_step)
        expected = reference.causal(inputs[layer].numpy(), filters)
        expected[1, : prompt - lengths[1]] = 0
        np.testing.assert_allclose(outputs[layer], expected, atol=1e-11)
    with pytest.raises(ValueError, match="tokens are decoded"):
        online.step(0, inputs[0, :, 0])


@pytest.mark.parametrize("lag_step", [1, 2])
@pytest.mark.parametrize(("prompt", "new"), [(64, 300), (100, 257), (7, 31)])
def test_convolution_costs_are_what_is_counted_and_held(lag_step, prompt, new):
    layers, width, batch = 2, 3, 2
    shape = convolution_costs.Shape(
        layers=layers,
        width=width,
        lag_step=lag_step,
        num_taps=-(-(prompt + new) // lag_step),
        batch=batch,
        prompt_tokens=prompt,
        new_tokens=new,
        page_len=32,
    )
    taps = torch.randn(layers, shape.num_taps, width)
    arguments = taps, batch, new, lag_step
    for name, online in {
        "naive": Naive(*arguments),
        "epoched": Epoched(*arguments),
        "continuous": Continuous(*arguments),
        "flashinference": FlashInference(*arguments, prompt_tokens=prompt),
    }.items():
        decode(online, torch.randn(layers, batch, prompt + new, width), [prompt, prompt])
        costs = convolution_costs.LOCKSTEP[name](shape).costs(shape)
        counted = (costs.convolution + costs.fft) * new
        assert counted == pytest.approx(online.multiply_adds / batch, rel=0.01), name
        assert convolution_costs.cache_bytes(name, shape) == online.cache_bytes, name


def test_paged_costs_are_what_is_counted_and_held(monkeypatch):
    # Of the two, torch counts the one that is not in place.
    monkeypatch.setattr(
        torch.Tensor, "baddbmm_", lambda its, *factors: its.copy_(its.baddbmm(*factors))
    )
    config = ModelConfig(vocab_size=9, width=8, layout="stu", num_layers=2, max_seq_len=1100)
    taps, lag_step = FlashSTU(config).convolution_taps()
    shape = convolution_costs.Shape(2, 8, lag_step, taps.shape[1], 1, 1, 1025, 32)
    pool = PagePool(33, (2, 32, 8))
    cache = ConvolutionCache(taps, lag_step, pool, max_rows=1)
    assert convolution_costs.cache_bytes("paged", shape) == cache.num_bytes
    cache.admit(0, 0, 1024)
    for layer in range(2):
        cache.prefill(0, layer, torch.randn(1, 1, 8))
    cache.join(0)
    # Products of the flushes, as torch counts them; those through the cores are elementwise.
    with FlopCounterMode(display=False) as counter:
        for _ in range(1024):
            for layer in range(2):
                cache.step(layer, torch.randn(1, 8))
            cache.advance()
    counts = convolution_costs.paged(shape, cache._tiles)
    counted = counts.multiply_adds * 16
    near = convolution_costs._within_pages(shape, 16, 0, 2).multiply_adds * 16
    cores = sum(
        lag_step * its.basis_cores.shape[1] * its.basis_cores.shape[2] * 16 * 2 ** (4 - level)
        for level, its in enumerate(cache._tiles._levels)
    )
    assert counted - near - cores == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
