"""Models that decode a batch in step: ours with one of several caches, or a peer."""

import time
from collections import Counter
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.decoding.caches import OURS, Flush, make_cache
from benchmarks.decoding.counting import counted
from benchmarks.decoding.shape import PAGE_LEN, Shape
from benchmarks.peers.peer import Peer
from benchmarks.timing import timed
from serve.cache.attention_windows import AttentionCache
from serve.cache.page_pool import PagePool
from serve.cache.recent_inputs import RecentInputs
from serve.engine.inference_model import inference_copy, inference_product
from stu.decoding.memory import window_pages
from stu.mixers import KeyWindow, LastInputs, Memory, remembered
from stu.model import FlashSTU

PEER_PROMPT_TOKENS = 8
"""Prompt tokens that a peer really reads, before its cache is set to a later position."""


class Subject(Protocol):
    """A batch that decodes in step, from any position."""

    def step(self) -> dict[str, float]:
        """Decode a token of each sequence; return the milliseconds of it and of its parts."""

    def count(self) -> Counter[str]:
        """Decode a token of each sequence; return what its operations do."""

    def seek(self, position: int) -> None:
        """Move to the state after this number of new tokens."""

    def flushes(self) -> list[Flush]:
        """Return the work that some steps of a run do beyond decoding a token."""


class CacheSubject(Memory):
    """Our model and its memory, decoded greedily with the engine's matrices.

    A step's `convolution` is the time in that cache.
    """

    def __init__(self, model: FlashSTU, cache: str, shape: Shape) -> None:
        weights, embedding = OURS.get(cache, "float"), model.embedding.weight
        self._model = inference_copy(model, weights)
        self._unembed = inference_product(embedding, weights)
        self.cache = make_cache(cache, model, shape)
        self._clock = Clock()
        self._windows = make_windows(model, shape)
        self._recent = make_recent_inputs(model, shape)
        self._tokens = torch.arange(shape.batch)

    @torch.inference_mode()
    def step(self) -> dict[str, float]:
        """Decode a token of each sequence; return the milliseconds of it and of its parts."""
        self._clock.restart()
        milliseconds = 1e3 * timed(self._decode)
        return {"step": milliseconds, "convolution": self._clock.milliseconds()}

    @torch.inference_mode()
    def seek(self, position: int) -> None:
        """Move to the state after this number of new tokens."""
        self.cache.seek(position)

    @torch.inference_mode()
    def count(self) -> Counter[str]:
        """Decode a token of each sequence; return what its operations do."""
        self._clock.restart()
        return counted(self._decode, lambda: self._clock.is_running)

    def flushes(self) -> list[Flush]:
        """Return the work that some steps of a run do beyond decoding a token."""
        return self.cache.flushes()

    def continue_convolution(self, number: int, streams: Tensor) -> Tensor:
        with self._clock:
            return self.cache.step(number, streams[:, 0])[:, None]

    def continue_short_convolution(self, number: int, inputs: Tensor, taps: Tensor) -> Tensor:
        assert self._recent is not None
        return self._recent.step(number, inputs, taps)

    def continue_attention(
        self, number: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        assert self._windows is not None
        return self._windows.step(number, queries, keys, values)

    def _decode(self) -> None:
        rows = list(range(len(self._tokens)))
        for cache in filter(None, (self._windows, self._recent)):
            cache.begin_step(rows, alone=False)
        hidden = self._model.hidden(self._tokens[:, None], self)[:, 0]
        with self._clock:
            self.cache.advance()
        if self._windows:
            self._windows.advance()
        self._tokens = self._unembed(hidden).argmax(-1)


class PeerSubject:
    """A peer, decoded greedily, with the methods of `CacheSubject`."""

    @torch.inference_mode()
    def __init__(self, peer: Peer, shape: Shape) -> None:
        self._peer, self._prompt_tokens = peer, shape.prompt_tokens
        peer.start(shape.batch, shape.prompt_tokens + shape.new_tokens)
        prompts = torch.arange(shape.batch)[:, None].expand(-1, PEER_PROMPT_TOKENS)
        self._tokens = peer.prefill(prompts).argmax(-1)

    @torch.inference_mode()
    def step(self) -> dict[str, float]:
        return {"step": 1e3 * timed(self._decode)}

    @torch.inference_mode()
    def count(self) -> Counter[str]:
        return counted(self._decode, lambda: False)

    @torch.inference_mode()
    def seek(self, position: int) -> None:
        self._peer.seek(self._prompt_tokens + position)

    def flushes(self) -> list[Flush]:
        return []

    def _decode(self) -> None:
        self._tokens = self._peer.step(self._tokens).argmax(-1)


class Clock:
    """Time spent within `with clock`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget the time so far."""
        self._marks: list[float] = []

    @property
    def is_running(self) -> bool:
        """Whether time is being spent within the clock now."""
        return len(self._marks) % 2 == 1

    def milliseconds(self) -> float:
        """Return the time since the restart."""
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        return 1e3 * sum(end - start for start, end in pairs)

    def __enter__(self) -> None:
        self._marks.append(time.perf_counter())

    def __exit__(self, *_: object) -> None:
        self._marks.append(time.perf_counter())


def make_recent_inputs(model: FlashSTU, shape: Shape) -> RecentInputs | None:
    """Return the cache of short convolutions, or None for a model without any."""
    layers, weight = remembered(model.mixers, LastInputs), model.embedding.weight
    if not layers:
        return None
    recent = RecentInputs(layers, shape.batch, weight.dtype, weight.device)
    for row in range(shape.batch):
        recent.admit(row, shape.prompt_tokens, shape.new_tokens)
    return recent


def make_windows(model: FlashSTU, shape: Shape) -> AttentionCache | None:
    """Return attention windows in the middle of a run, or None for a model without attention."""
    layers, weight = remembered(model.mixers, KeyWindow), model.embedding.weight
    if not layers:
        return None
    heads, head_dim = layers[0].num_heads, layers[0].head_dim
    num_pages = shape.batch * window_pages(layers[0].window_tokens, PAGE_LEN) + 1
    page = len(layers), 2, PAGE_LEN, heads, head_dim
    windows = AttentionCache(layers[0], PagePool(num_pages, page, weight.dtype, weight.device))
    some = weight.new_full((1, shape.prompt_tokens + shape.new_tokens // 2, heads, head_dim), 0.1)
    for row in range(shape.batch):
        windows.admit(row, shape.prompt_tokens, shape.new_tokens)
        windows.begin_chunk(row, some.shape[1])
        for layer in range(len(layers)):
            windows.prefill(row, layer, some, some, some)
    return windows
