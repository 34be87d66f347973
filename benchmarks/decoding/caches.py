"""Convolution caches that can be set to any position of a run, for a batch that decodes in step.

`naive`: direct sums, which read even lags only. `epoched`, `continuous`: FutureFill as in
`stu.futurefill`. `flashinference`: the tiles of `continuous` over prompt and generation alike, the
schedule of Oncescu, Purandare, Idreos and Kakade, "Flash Inference: Near Linear Time Inference for
Long Convolution Sequence Models and Beyond", arXiv:2410.12982: positions are counted from the
prompt's first token, whose input stays in the buffer. `paged`: the engine's own.

Only the time of a step matters. Caches are filled with a number, because memory that was never
written to is read too fast.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.decoding.shape import PAGE_LEN, Shape
from serve.cache.page_pool import PagePool
from serve.cache.paged_futurefill import ConvolutionCache
from stu.futurefill import Continuous, Epoched
from stu.model import FlashSTU
from stu.online_convolution import Naive

NUMBER = 0.1
CACHES = ["paged", "continuous", "epoched", "flashinference", "naive"]


@dataclass(frozen=True)
class Flush:
    """Work that some steps do beyond decoding a token."""

    does: str
    positions: list[int]
    """Numbers of new tokens after which it occurs, in the middle of a run."""
    count: float
    """Number of a run's steps that do it."""
    counted_at: int
    """Number of new tokens after which its operations are counted. Where it occurs only once, a
    cache that cannot go back counts a step without it."""


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
        ends, flushes = self.page_ends(), []
        for part in range(4):
            part_ends = ends[len(ends) * part // 4 : len(ends) * (part + 1) // 4]
            if part_ends:
                end = part_ends[len(part_ends) // 2]
                does = f"a fill from {end} positions"
                flushes.append(Flush(does, [end], len(part_ends), end))
        return flushes


class SeekableContinuous(_Slots, Continuous):
    """Continuous FutureFill. first_position: Prompt's length if its inputs stay, else 0."""

    def __init__(
        self,
        taps: Tensor,
        batch: int,
        max_positions: int,
        lag_step: int,
        first_position: int,
    ) -> None:
        super().__init__(taps, batch, max_positions, lag_step)
        self.first_position = first_position

    def begin(self) -> None:
        super().begin()
        for flush in self.flushes():  # the first of each size would transform the filters
            self._plan((self.first_position + flush.positions[0]) // self.lag_step)

    def flushes(self) -> list[Flush]:
        return by_tile(self.page_ends(), self.first_position)


class Paged:
    """The engine's cache, which reaches a later position by decoding random inputs."""

    def __init__(self, taps: Tensor, lag_step: int, shape: Shape, filters: Tensor) -> None:
        self.num_layers, self.num_pages = len(taps), shape.num_pages
        width = shape.config.width
        page = self.num_layers, PAGE_LEN, width
        num_pages = shape.batch * self.num_pages + 1
        pool = PagePool(num_pages, page, filters.dtype, filters.device)
        pool.pages.fill_(NUMBER)
        self.cache = ConvolutionCache(taps, lag_step, pool, shape.batch)
        self.step, self.position = self.cache.step, 0
        self._inputs = 0.01 * torch.randn(shape.batch, width).to(pool.pages)
        for row in range(shape.batch):
            self.cache.admit(row, shape.prompt_tokens, shape.new_tokens - 1)
            self.cache.join(row)

    def advance(self) -> None:
        self.position += 1
        self.cache.advance()

    def seek(self, position: int) -> None:
        while self.position < position:
            for layer in range(self.num_layers):
                self.step(layer, self._inputs)
            self.advance()

    def flushes(self) -> list[Flush]:
        return by_tile(range(PAGE_LEN, self.num_pages * PAGE_LEN, PAGE_LEN), 0)


def by_tile(page_ends: range, first: int) -> list[Flush]:
    """Return a flush for each tile size, in the middle of the run.

    page_ends: Numbers of new tokens after which pages end. first: Position of the first new token.
    """
    ends: dict[int, list[int]] = {}
    for end in page_ends:
        pages = (first + end) // page_ends.step
        ends.setdefault(page_ends.step * (pages & -pages), []).append(end)
    flushes = []
    for tile, places in sorted(ends.items()):
        middle = places[len(places) // 2 :][:3]
        timed = middle[:-1] or middle
        flushes.append(Flush(f"a flush of {tile} positions", timed, len(places), middle[-1]))
    return flushes


Cache = Paged | SeekableNaive | SeekableEpoched | SeekableContinuous


def make_cache(name: str, model: FlashSTU, shape: Shape) -> Cache:
    """Return the cache of that name, with `step`, `advance`, `flushes` and `seek`, which moves
    forward to the state after a number of new tokens."""
    taps, lag_step = model.convolution_taps()
    if name == "paged":
        return Paged(taps, lag_step, shape, model.filters)
    arguments = taps.float(), shape.batch, shape.new_tokens, lag_step
    if name == "naive":
        return SeekableNaive(*arguments, max_prompt_tokens=shape.prompt_tokens)
    if name == "epoched":
        return SeekableEpoched(*arguments)
    prompt = shape.prompt_tokens if name == "flashinference" else 0
    return SeekableContinuous(
        taps.float(), shape.batch, prompt + shape.new_tokens, lag_step, prompt
    )
