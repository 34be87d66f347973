"""Convolution caches that can be set to any position of a run, for a batch that decodes in step.

`ours`: the engine's own; `ours_int8`: with weights of 8 bits. `naive`: direct sums, which read even
lags only. `epoched`, `continuous`: FutureFill as in `stu.futurefill`. `flashinference`: the tiles
of `continuous` over prompt and generation alike, the schedule of Oncescu, Purandare, Idreos and
Kakade, "Flash Inference: Near Linear Time Inference for Long Convolution Sequence Models and
Beyond", arXiv:2410.12982: positions are counted from the prompt's first token, whose input stays in
the buffer.

Only the time of a step matters. Caches are filled with a number, because memory that was never
written to is read too fast.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.decoding.shape import PAGE_LEN, Shape
from serve.cache.base import CachePlan
from serve.cache.budget import cache_plan
from serve.cache.paged_futurefill import PagedFutureFill
from serve.cache.spectral_state import SpectralStates
from serve.config import EngineConfig
from stu.config import Weights
from stu.futurefill import Continuous, Epoched
from stu.mixers import PastInputs, remembered
from stu.model import FlashSTU
from stu.online_convolution import Naive

NUMBER = 0.1
CacheKind = Literal["state", "pages"]
OURS: dict[str, Weights] = {"ours": "float", "ours_int8": "int8"}
"""The engine's cache, and the format of the weights beside it."""
CACHES = [*OURS, "continuous", "epoched", "flashinference", "naive"]


@dataclass(frozen=True)
class Flush:
    """Work that some steps do beyond decoding a token."""

    does: str
    positions: list[int]
    """Numbers of new tokens after which it occurs, in the middle of a run."""
    count: float
    """Number of a run's steps that do it."""
    counted_at: int
    """Number of new tokens after which its operations are counted."""


class SeekableNaive(Naive):
    """Direct sums, after a prompt of the greatest length."""

    def seek(self, position: int) -> None:
        if not self._prompt_columns:
            self._prompt_columns = self._origin
            self._inputs.fill_(NUMBER)
            self._latest.fill_(NUMBER)
        self.position = position

    def flushes(self) -> list[Flush]:
        line = self.LINE_COLUMNS * self.lag_step
        count = (self.max_new_tokens - 1) // line
        middle = line * (count // 2 + count % 2)
        return [Flush("inputs of a line put away", [middle], count, middle)] if count else []


class _Slots:
    """Slots for new tokens, and the page that is being decoded."""

    _slots: Tensor
    _page: Tensor
    _place: int
    position: int
    max_new_tokens: int
    page_columns: int
    lag_step: int
    first_position = 0
    """Position of the first new token, as the convolution counts."""

    def seek(self, position: int) -> None:
        if self.position == 0:
            self.begin()
        self.position = self.first_position + position
        self._place = self.position % (self.page_columns * self.lag_step)

    def begin(self) -> None:
        """Fill the buffers before the first step."""
        self._slots.fill_(NUMBER)
        self._page.fill_(NUMBER)

    def page_ends(self) -> range:
        """Return the numbers of new tokens after which a page, not the last, ends."""
        page = self.page_columns * self.lag_step
        first = (self.first_position // page + 1) * page
        return range(first - self.first_position, self.max_new_tokens - self.first_position, page)


class SeekableEpoched(_Slots, Epoched):
    """Epoched FutureFill; one fill in each quarter of a run is timed."""

    def flushes(self) -> list[Flush]:
        ends = self.page_ends()
        parts = [ends[len(ends) * i // 4 : len(ends) * (i + 1) // 4] for i in range(4)]
        middles = [(part[len(part) // 2], len(part)) for part in parts if part]
        return [Flush(f"a fill from {end} positions", [end], n, end) for end, n in middles]


class SeekableContinuous(_Slots, Continuous):
    """Continuous FutureFill; its first position is the prompt's length if its inputs stay."""

    def begin(self) -> None:
        super().begin()
        for flush in self.flushes():  # the first of each size would transform the filters
            self._plan((self.first_position + flush.positions[0]) // self.lag_step)

    def flushes(self) -> list[Flush]:
        return by_tile(self.page_ends(), self.first_position)


class EngineCache:
    """The engine's cache, which reaches a position by decoding random inputs.

    kind: `convolution_cache` of the engine.
    """

    position: int

    def __init__(self, model: FlashSTU, shape: Shape, kind: CacheKind | None = None) -> None:
        self._plan, self._shape = engine_plan(model, shape, kind), shape
        past, self._rows = remembered(model.mixers, PastInputs), list(range(shape.batch))
        self.num_layers = len(past)
        self._inputs = 0.01 * torch.randn(shape.batch, past[0].channels).to(model.filters)
        self._begin()

    def step(self, layer: int, inputs: Tensor) -> Tensor:
        if layer == 0:
            self.cache.begin_step(self._rows, alone=False)
        return self.cache.step(layer, inputs)

    def advance(self) -> None:
        self.position += 1
        self.cache.advance()

    def seek(self, position: int) -> None:
        if self.cache.pool is not None and position < self.position:
            del self.cache  # its memory is free for the next one
            self._begin()  # pages cannot go back
        steps = position - self.position
        if self.cache.pool is None:
            steps %= PAGE_LEN  # with states, only the place in a page matters
        for _ in range(steps):
            for layer in range(self.num_layers):
                self.step(layer, self._inputs)
            self.advance()
        if self.cache.pool is None:
            self.position = position

    def flushes(self) -> list[Flush]:
        pages = self._shape.num_pages
        if isinstance(self.cache, PagedFutureFill):
            return by_tile(range(PAGE_LEN, pages * PAGE_LEN, PAGE_LEN), 0)
        ends = sorted(PAGE_LEN * (pages // 2) + end for end in set(self.cache.page_ends()))
        return [Flush("page ends of some layers", ends[:3], len(ends) * pages, ends[-1])]

    def _begin(self) -> None:
        shape = self._shape
        cache = self._plan.make(shape.batch * self._plan.size.usual_pages)
        assert isinstance(cache, SpectralStates | PagedFutureFill)
        self.cache, self.position = cache, 0
        if cache.pool is not None:
            cache.pool.pages.fill_(NUMBER)
        for row in self._rows:
            cache.admit(row, shape.prompt_tokens, shape.new_tokens - 1)
            cache.join(row)


def engine_plan(model: FlashSTU, shape: Shape, kind: CacheKind | None = None) -> CachePlan:
    """Return the plan of the engine's cache for this batch."""
    config = EngineConfig(
        page_len=PAGE_LEN,
        max_running=shape.batch,
        expected_new_tokens=shape.new_tokens - 1,
        convolution_cache=kind,
    )
    plan = cache_plan(PastInputs, model, config)
    assert plan is not None, "the model has no long convolutions"
    return plan


def cache_bytes(name: str, model: FlashSTU, shape: Shape) -> int:
    """Return the bytes that a convolution cache allocates for the batch."""
    if name not in OURS:
        return shape.cache_bytes(name)
    size = engine_plan(model, shape).size
    return size.fixed_bytes + shape.batch * size.usual_pages * size.page_bytes


def by_tile(page_ends: range, first: int) -> list[Flush]:
    """Return a flush for each tile size, in the middle of the run.

    page_ends: Numbers of new tokens after which pages end. first: Position of the first new token.
    """
    ends: dict[int, list[int]] = {}
    for end in page_ends:
        pages = (first + end) // page_ends.step
        ends.setdefault(page_ends.step * (pages & -pages), []).append(end)
    middles = {tile: places[len(places) // 2 :][:3] for tile, places in sorted(ends.items())}
    return [
        Flush(f"a flush of {tile} positions", middle[:-1] or middle, len(ends[tile]), middle[-1])
        for tile, middle in middles.items()
    ]


Cache = EngineCache | SeekableNaive | SeekableEpoched | SeekableContinuous


def make_cache(name: str, model: FlashSTU, shape: Shape) -> Cache:
    """Return the cache of that name, with `step`, `advance`, `flushes` and `seek`, which moves
    to the state after a number of new tokens."""
    if name in OURS:
        return EngineCache(model, shape)
    taps, lag_step = model.convolution_taps()
    arguments = taps.float(), shape.batch, shape.new_tokens, lag_step
    if name == "naive":
        return SeekableNaive(*arguments, max_prompt_tokens=shape.prompt_tokens)
    if name == "epoched":
        return SeekableEpoched(*arguments)
    prompt = shape.prompt_tokens if name == "flashinference" else 0
    cache = SeekableContinuous(arguments[0], shape.batch, prompt + shape.new_tokens, lag_step)
    cache.first_position = prompt
    return cache
