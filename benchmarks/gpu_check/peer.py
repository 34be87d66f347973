"""The Llama-like peer of the check: equal in size, compiled, and captured as a CUDA graph."""

import statistics
from functools import partial
from itertools import chain

import torch

from benchmarks.gpu_check.llama import LlamaLike
from benchmarks.gpu_check.measuring import (
    Figures,
    Measures,
    captured,
    decoding_dtype,
    energy,
    release_memory,
    step_times,
)
from benchmarks.gpu_check.sizes import Sizes
from benchmarks.timing import timed
from stu.config import ModelConfig
from train.flops import num_parameters

PREFILL_REPEATS = 3


def decode_measures(device: str, sizes: Sizes) -> Measures:
    """Yield the peer of each model at each batch."""
    compiler = "inductor" if device == "cuda" else "eager"  # which only traces
    for name, config in sizes.models.items():
        peer = make_peer(config, device)
        for layer in peer.layers:  # they share what is compiled
            layer.compile(dynamic=False, backend=compiler)
        for batch in sizes.peer_batches:
            yield f"size of {name}, batch {batch}", partial(decode, peer, batch, sizes)
            release_memory()
        del peer
        release_memory()
        torch.compiler.reset()


def make_peer(config: ModelConfig, device: str) -> LlamaLike:
    """Return a peer of the size of a model."""
    torch.manual_seed(0)
    with torch.device(device):
        peer = LlamaLike(config, num_parameters(config))
    return peer.to(decoding_dtype(device)).requires_grad_(False)


@torch.no_grad()
def decode(peer: LlamaLike, batch: int, sizes: Sizes) -> Figures:
    """Return the figures of a batch with as much context as ours."""
    positions = sizes.context + sizes.warm_steps + sizes.steps
    caches = peer.make_cache(batch, positions)
    for cache in chain.from_iterable(caches):
        cache.normal_()
    device = peer.embedding.weight.device
    tokens = torch.arange(batch, device=device)
    position = torch.full((1,), sizes.context, device=device)

    def step() -> None:
        tokens.copy_(peer.step(tokens, caches, position).argmax(-1))
        position.add_(1).clamp_(max=positions - 1)

    run = captured(step)
    figures = step_times(run, sizes.steps, waits=True)
    figures["tokens_per_second"] = 1e3 * batch / figures["mean_step_ms"]
    figures["parameters"] = sum(parameter.numel() for parameter in peer.parameters())
    return figures | energy(run, sizes.energy_seconds)


@torch.no_grad()
def prefill(config: ModelConfig, device: str, prompt_tokens: int) -> Figures:
    """Return the seconds from a prompt to the logits of its first token, uncompiled."""
    peer = make_peer(config, device)
    caches = peer.make_cache(1, prompt_tokens)
    tokens = torch.arange(prompt_tokens, device=device)[None] % config.vocab_size
    read = partial(peer.prefill, tokens, caches)
    first, *others = (timed(read) for _ in range(1 + PREFILL_REPEATS))
    return {"prefill_seconds": statistics.median(others), "first_seconds": first}
