"""An engine whose convolutions are remembered by one of several caches, set to any position."""

import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.costs import FLOAT_BYTES
from benchmarks.flash_inference import FlashInference
from benchmarks.lockstep_cache import LockstepCache
from serve.cache.attention_windows import window_pages
from serve.cache.page_pool import pages_for
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.runner import Prompt
from stu.config import ModelConfig
from stu.futurefill import Continuous, Epoched
from stu.mixers import KeyWindow, LastInputs, PastInputs, planned_mixers, remembered
from stu.model import FlashSTU
from stu.online_convolution import Naive, OnlineConvolution
from stu.tokenizer import Tokenizer, train_bpe

VOCAB_SIZE = 4096
KINDS = {"epoched": Epoched, "continuous": Continuous}
SLACK_BYTES = 64
"""A size in GiB is rounded."""


def make_engine(
    model: FlashSTU,
    cache_name: str,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    page_len: int,
) -> tuple[Engine, Any]:
    """An engine whose convolutions are remembered by the cache of that name, and that cache."""
    layers = len(remembered(model.mixers, PastInputs))
    page_bytes = layers * model.config.width * page_len * FLOAT_BYTES
    expected = new_tokens - 1 if cache_name == "paged" else 1  # others have memory of their own
    num_pages = batch * (pages_for(expected, page_len) + 2) + 1
    number_bytes = model.embedding.weight.element_size()
    num_bytes = num_pages * page_bytes + other_bytes(model.config, batch, page_len, number_bytes)
    config = EngineConfig(
        cache_gib=(num_bytes + SLACK_BYTES) / 2**30,
        page_len=page_len,
        max_running=batch,
        prompt_tokens_per_step=prompt_tokens * batch,
        expected_new_tokens=expected,
    )
    if cache_name == "paged":
        engine = Engine(model, tokenizer(), config)
        return engine, engine._caches.convolution
    taps, lag_step = model.convolution_taps()
    # Taps of one page have no tiles to factorize, which takes seconds.
    few = taps[:, : page_len // lag_step], lag_step
    with mock.patch.object(model, "convolution_taps", return_value=few):
        engine = Engine(model, tokenizer(), config)
    arguments = taps.float(), batch, new_tokens, lag_step
    cache = LockstepCache(online_convolution(cache_name, arguments, prompt_tokens))
    cache.pool = engine._caches.convolution.pool  # which it does not use
    engine._caches.by_kind[PastInputs] = cache
    engine._scheduler._config = replace(config, expected_new_tokens=None)
    return engine, cache


def online_convolution(
    cache_name: str, arguments: tuple[Tensor, int, int, int], prompt_tokens: int
) -> OnlineConvolution:
    """One of those that are not paged."""
    if cache_name == "flashinference":
        return FlashInference(*arguments, prompt_tokens=prompt_tokens)
    if cache_name == "naive":
        return Naive(*arguments, max_prompt_tokens=prompt_tokens)
    return KINDS[cache_name](*arguments)


def other_bytes(
    config: ModelConfig, batch: int, page_len: int, number_bytes: int = FLOAT_BYTES
) -> int:
    """What the engine allocates besides a convolution cache: attention's pages, a null page among
    them, and the inputs that short convolutions remember. number_bytes: of each of the weights'."""
    windows = remembered(planned_mixers(config), KeyWindow)
    pages = 0
    if windows:
        each = min(pages_for(config.max_seq_len, page_len), window_pages(windows[0], page_len))
        pages = (batch * each + 1) * 2 * len(windows) * config.width * page_len
    short = remembered(planned_mixers(config), LastInputs)
    recent = (batch + 1) * sum((layer.num_taps - 1) * layer.channels for layer in short)
    return (pages + recent) * number_bytes


@functools.cache
def tokenizer() -> Tokenizer:
    """Of the standard library's own modules: text is decoded as it would be."""
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = [module.read_text(encoding="utf-8") for module in modules]
    with tempfile.TemporaryDirectory() as folder:
        return train_bpe(texts, VOCAB_SIZE, Path(folder) / "tokenizer.model")


def skip_prompts(engine: Engine, cache: Any, prompt_tokens: int) -> None:
    """Take prompts in without computing anything, into caches that are full of some number: memory
    that was never written to reads too fast."""
    with torch.inference_mode():
        if isinstance(cache, LockstepCache):
            cache.fill(prompt_tokens)
        else:
            cache.pool.pages.fill_(0.1)

    def prefill(prompts: Sequence[Prompt], tokens_at_once: int) -> Iterator[Tensor]:
        for prompt in prompts:
            _seek_window(engine, prompt.owner, len(prompt.tokens))
        yield torch.randn(len(prompts), VOCAB_SIZE, device=engine._runner._device)

    engine._runner.prefill = prefill  # type: ignore[method-assign,assignment]


def seek(engine: Engine, cache: Any, prompt_tokens: int, position: int) -> None:
    """Set every row of the batch to so many new tokens."""
    for job in engine._scheduler.running:
        job.new_token_ids[1:] = job.new_token_ids[:1] * position
        job.replayed = len(job.new_token_ids)
        job.steps_left = job.request.sampling.max_new_tokens - len(job.new_token_ids)
        _seek_window(engine, job.request_id, prompt_tokens + position)
    if isinstance(cache, LockstepCache):
        cache.seek(position)
        return
    done, place = divmod(position, cache._page_len)
    cache._columns_reached = -(-(cache._page_len - place) // cache._lag_step)
    cache.pool.free = lambda owner, pages: None  # it may go back
    tiles = cache._tiles
    for sequence in cache._sequences.values():
        cache._time = cache._starts[0] + position  # of all: they began together
        sequence.tiles, sequence.pending, first = [], {}, 0
        for level in (i for i in reversed(range(done.bit_length())) if done & 2**i):
            num_held = 2**level if level < tiles._smallest_summary else tiles._summary_pages
            sequence.tiles.append(sequence.pages[first : first + num_held])
            first += 2**level
        for level in range(tiles._smallest_summary + 1, len(tiles._levels)):
            if done >= 2**level and done % 2**level < 2 ** (level - 1):
                first = tiles._summary_pages * level  # any that no tile has
                sequence.pending[level] = sequence.pages[first : first + tiles._summary_pages]


def _seek_window(engine: Engine, owner: int, length: int) -> None:
    """Set a sequence's attention window as if it had so many positions."""
    attention = engine._caches.attention
    if attention is None:
        return
    its, page_len = attention._windows[owner], attention._page_len
    attention.pool.free(owner, its.pages)
    its.pages, its.length = [], length
    its.first_page = max(0, length - attention._window.window_tokens) // page_len
    attention._allocate(owner, (length - 1) // page_len - its.first_page + 1)


def cache_flushes(cache: Any, new_tokens: int) -> list[tuple[str, int, int]]:
    """What flushes do, a position at which each occurs, and how many it stands for."""
    if isinstance(cache, LockstepCache):
        return cache.sampled_flushes()
    page_len = cache._page_len
    num_pages = pages_for(new_tokens - 1, page_len)
    flushes = []
    for size in (2**i for i in range(num_pages.bit_length()) if 2**i < num_pages):
        ends = range(size, num_pages, 2 * size)
        middle = page_len * ends[len(ends) // 2]
        flushes.append((f"a flush of {size * page_len} positions", middle, len(ends)))
    return flushes
