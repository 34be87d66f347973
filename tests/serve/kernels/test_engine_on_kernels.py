"""An engine whose steps run the kernels, in Triton's interpreter, decodes as one in torch.

`test_interpreter.py` starts a process of its own for this file.
"""

import os
from collections import Counter

import pytest
import torch

from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.kernels import (
    alternating_field,
    gated,
    narrow_product,
    near_field,
    norm,
    page_end,
    window_attention,
)
from serve.sampling_params import SamplingParams
from stu.config import ModelConfig
from stu.model import FlashSTU
from tests.serve.requests import make_request

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


KERNELS = [
    (near_field, "triton_near_field"),
    (norm, "triton_add_norm"),
    (page_end, "triton_page_end"),
    (window_attention, "triton_window_attention"),
]
NARROW_KERNELS = [
    (gated, "triton_gated_product"),
    (narrow_product, "triton_narrow_product"),
]
"""Kernels that run here with weights of 8 bits alone, as float ones are packed."""


FULL_KERNELS = [
    (alternating_field, "triton_alternating_field"),
    (page_end, "triton_page_end"),
]


def counted(function, name, runs):
    """Return a function that also counts its runs."""

    def run(*args):
        runs[name] += 1
        return function(*args)

    return run


def decode(model, tokenizer, static, weights="float"):
    """Return the tokens and log probabilities of three requests."""
    config = EngineConfig(cache_gib=0.02, page_len=4, weights=weights)
    engine = Engine(model, tokenizer, config, static)
    results = {}
    for number, length in enumerate([1, 5, 14]):
        prompt = torch.randint(0, 280, (length,), generator=torch.Generator().manual_seed(number))
        sampling = SamplingParams(temperature=number % 2, seed=number, logprobs=1)
        request = make_request(prompt.tolist(), 9 + number, sampling=sampling)
        results[engine.add(request)] = ([], [])
    while engine.has_work:
        for output in engine.step():
            tokens, logprobs = results[output.request_id]
            tokens += output.new_token_ids
            logprobs += [token.logprob for token in output.logprobs]
    return list(results.values())


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_engine_on_triton_kernels(code_tokenizer, monkeypatch, weights):
    torch.manual_seed(0)
    shape = {"width": 20, "num_heads": 4, "num_filters": 6, "mlp_ratio": 1}
    shape["num_layers"] = 4 if weights == "float" else 2
    config = ModelConfig(280, **shape, max_seq_len=100, window_tokens=7)
    model, runs = FlashSTU(config).eval(), Counter()
    for module, name in [*KERNELS, *NARROW_KERNELS]:
        monkeypatch.setattr(module, name, counted(getattr(module, name), name, runs))
    found = decode(model, code_tokenizer, static=True, weights=weights)
    kernels = KERNELS if weights == "float" else [*KERNELS, *NARROW_KERNELS]
    assert set(runs) == {name for _, name in kernels}
    monkeypatch.undo()
    for module, _ in [*KERNELS, *NARROW_KERNELS]:
        monkeypatch.setattr(module, "uses_triton", lambda _: False)
    expected = decode(model, code_tokenizer, static=False, weights=weights)
    for (tokens, logprobs), (wanted, wanted_logprobs) in zip(found, expected, strict=True):
        assert tokens == wanted
        torch.testing.assert_close(logprobs, wanted_logprobs, rtol=0, atol=1e-5)


def test_the_full_form_on_triton_kernels(code_tokenizer, monkeypatch):
    torch.manual_seed(0)
    shape = {"width": 20, "num_heads": 4, "num_layers": 2, "num_filters": 3, "mlp_ratio": 1}
    config = ModelConfig(280, **shape, max_seq_len=100, layout="stu", stu_form="full")
    model, runs = FlashSTU(config).eval(), Counter()
    for module, name in FULL_KERNELS:
        monkeypatch.setattr(module, name, counted(getattr(module, name), name, runs))
    found = decode(model, code_tokenizer, static=True)
    assert set(runs) == {name for _, name in FULL_KERNELS}
    expected = decode(model, code_tokenizer, static=False)
    for (tokens, logprobs), (wanted, wanted_logprobs) in zip(found, expected, strict=True):
        assert tokens == wanted
        torch.testing.assert_close(logprobs, wanted_logprobs, rtol=0, atol=1e-5)
