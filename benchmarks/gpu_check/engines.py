"""Engines at work: how the parts of the check fill one, and what a step of it must move."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from serve.config import EngineConfig, EngineWeights
from serve.engine.engine import Engine
from serve.request import Request
from serve.sampling_params import SamplingParams
from stu.mixers import KeyWindow, remembered
from stu.model import FlashSTU
from stu.tokenizer import Tokenizer


@dataclass(frozen=True)
class NoText:
    """A tokenizer for models with random weights: all tokens have the same text."""

    vocab_size: int
    eos_id: int = -1

    def token_bytes(self, token: int) -> bytes:
        """Return the text of a token."""
        return b" a"


def make_engine(
    model: FlashSTU, batch: int, captures: bool = False, weights: EngineWeights = "float"
) -> Engine:
    """Return an engine for so many requests, whose steps are captured or called from Python."""
    config = EngineConfig(
        max_running=batch, prefix_cache_gib=0, enforce_eager=not captures, weights=weights
    )
    tokenizer = cast(Tokenizer, NoText(model.config.vocab_size))
    return Engine(model, tokenizer, config)


def make_request(
    model: FlashSTU, prompt_tokens: int, new_tokens: int, seed: int, **sampling: Any
) -> Request:
    """Return a request with a random prompt, decoded greedily unless `sampling` says otherwise."""
    source = torch.Generator().manual_seed(seed)
    prompt = torch.randint(model.config.vocab_size, (prompt_tokens,), generator=source)
    params = SamplingParams(max_new_tokens=new_tokens, stop_at_eos=False, seed=seed, **sampling)
    return Request(prompt.tolist(), params)


@contextmanager
def filled(
    engine: Engine, model: FlashSTU, batch: int, prompt_tokens: int, **sampling: Any
) -> Iterator[None]:
    """Add requests that decode to the end of the context, and step until all of them decode. They
    are aborted at the end.

    Raises RuntimeError if one ends before, because not all fit into the cache at once.
    """
    new_tokens = model.config.max_seq_len - prompt_tokens
    requests = [
        make_request(model, prompt_tokens, new_tokens, seed, **sampling) for seed in range(batch)
    ]
    ids = [engine.add(request) for request in requests]
    decoding: set[int] = set()
    try:
        while len(decoding) < batch:
            for output in engine.step():
                decoding.add(output.request_id)
                if output.finish_reason is not None:
                    raise RuntimeError(f"{len(decoding)} of {batch} requests fit into the cache")
        yield
    finally:
        for request_id in ids:
            engine.abort(request_id)
        while engine.has_work:
            engine.step()


def step_bytes(
    engine: Engine,
    model: FlashSTU,
    batch: int,
    num_tokens: int,
    weights: EngineWeights = "float",
) -> int:
    """Return the bytes that a step must move: weights are read once, and so are the keys and values
    in each row's window; states are read and written once in a page.

    num_tokens: Tokens of each sequence.
    """
    narrow = {*model.matrices, "embedding.weight"} if weights != "float" else set()
    num_bytes = sum(
        parameter.numel() if name in narrow else parameter.nbytes
        for name, parameter in model.named_parameters()
    )
    for window in remembered(model.mixers, KeyWindow):
        numbers = min(num_tokens, window.window_tokens) * window.num_heads * window.head_dim
        num_bytes += batch * 2 * numbers * model.embedding.weight.element_size()
    info = engine.stats().convolution_cache
    if info is not None and info.kind == "state":
        num_bytes += batch * 2 * info.page_bytes // EngineConfig.page_len
    return num_bytes
