"""Peers of the decode benchmark: steps equal the whole forward pass, and caches have their size."""

import importlib.util

import numpy as np
import pytest
import torch

from benchmarks.peers import PEERS, build_peers
from benchmarks.peers.s4 import S4Model
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.model import FlashSTU
from tests.reference import s4 as s4_reference

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(
    not HAS_TRANSFORMERS, reason="transformers is not installed: pip install '.[bench]'"
)
NAMES = [pytest.param(name, marks=[] if name == "s4" else [needs_transformers]) for name in PEERS]
SHAPE = ModelConfig(
    vocab_size=301, width=64, layout="stu", num_layers=6, num_heads=8, max_seq_len=256
)


def build(name, packed=False):
    torch.manual_seed(0)
    num_parameters = FlashSTU(SHAPE).num_parameters()
    if packed:
        return build_peers([name], SHAPE, num_parameters)[name]
    return PEERS[name](SHAPE, num_parameters)


def whole_forward(name, peer, tokens):
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
    return [value.detach().numpy() for value in values]


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
def test_caches_and_models_have_their_size(name):
    peer = build(name)
    peer.start(2, 7)
    peer.prefill(torch.ones(2, 7, dtype=torch.long))
    if name == "s4":
        tensors = [peer.states]
    elif name == "rwkv":
        tensors = [*(shifts.state for shifts in peer.state[:2]), *peer.state[2:]]
    elif name == "mamba2":
        layers = peer.cache.layers
        tensors = [layer.conv_states[0] for layer in layers]
        tensors += [layer.recurrent_states[0] for layer in layers]
    else:
        tensors = [part for layer in peer.cache.layers for part in (layer.keys, layer.values)]
    ours = FlashSTU(SHAPE).num_parameters()
    assert abs(peer.num_parameters / ours - 1) <= 0.05
    held = sum(tensor.nbytes for tensor in tensors)
    assert held == peer.cache_bytes(2, 7)


def test_a_peer_that_cannot_be_of_that_size_is_refused():
    with pytest.raises(UserError, match="S4 comes to"):
        PEERS["s4"](SHAPE, 10_000)  # less than its embedding


@torch.no_grad()
def test_missing_transformers_is_said_how_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install '\.\[bench\]' in the checkout"):
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
