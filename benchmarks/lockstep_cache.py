"""Unpaged convolution caches of a batch that starts together, behind the paged one's interface."""

from torch import Tensor

from serve.cache.base import Cache, CacheSize
from serve.config import EngineConfig
from stu.futurefill import Continuous, _Filled
from stu.model import FlashSTU
from stu.online_convolution import Naive, OnlineConvolution

MOST_FLUSHES = 4


class LockstepCache(Cache):
    """The calls of `paged_futurefill.ConvolutionCache` on `convolution`; rows step together."""

    def __init__(self, convolution: OnlineConvolution) -> None:
        self._convolution = convolution
        self.flushes: dict[int, tuple[int, float]] = {}
        self._first_position = convolution.position
        self._rows: dict[int, int] = {}

    @classmethod
    def size(cls, model: FlashSTU, config: EngineConfig) -> CacheSize | None:
        """None: its memory is its own."""
        return None

    @classmethod
    def make(cls, model: FlashSTU, config: EngineConfig, num_pages: int) -> Cache:
        """It is put in place of another."""
        raise NotImplementedError

    @property
    def num_bytes(self) -> int:
        """Bytes of the convolution's cache."""
        return self._convolution.cache_bytes

    def admit(self, owner: int, prompt_tokens: int, new_tokens: int) -> None:
        """Give `owner` the next row."""
        self._rows[owner] = len(self._rows)

    def prefill(self, owner: int, layer: int, inputs: Tensor) -> Tensor:
        """Take a prompt `[1, P, D]`."""
        row = self._rows[owner]
        return self._convolution.prefill(layer, inputs, slice(row, row + 1))

    def release(self, owner: int) -> None:
        """All rows stay."""

    def leave(self, row: int) -> None:
        """All rows stay."""

    def join(self, owner: int) -> None:
        """All rows were admitted in the order in which they join."""

    def step(self, layer: int, inputs: Tensor, first_row: int = 0) -> Tensor:
        """One token of every row."""
        return self._convolution.step(layer, inputs)

    def advance(self) -> None:
        """Every layer has stepped."""
        self._convolution.advance()

    def fill(self, prompt_tokens: int) -> None:
        """Write some number everywhere, in place of taking prompts of so many tokens in."""
        convolution = self._convolution
        if isinstance(convolution, _Filled):
            convolution._slots.fill_(0.1)
            convolution._page.fill_(0.1)
            return
        assert isinstance(convolution, Naive)
        convolution._latest.fill_(0.1)
        columns = -(-prompt_tokens // convolution.lag_step)
        convolution._prompt_columns = min(columns, convolution._origin)
        convolution._inputs.fill_(0.1)

    def seek(self, position: int) -> None:
        """Go on as if so many new tokens had been decoded."""
        convolution = self._convolution
        convolution.position = self._first_position + position
        if isinstance(convolution, _Filled):
            page_tokens = convolution.page_columns * convolution.lag_step
            convolution._place = convolution.position % page_tokens

    def prepare_flushes(self) -> None:
        """Transform the filters, as the first flush of each size does."""
        if isinstance(self._convolution, Continuous):
            for end in self._page_ends():
                self._convolution._plan(end // self._convolution.lag_step)

    def sampled_flushes(self) -> list[tuple[str, int, int]]:
        """What happens at the ends of pages, where for example, and how many each stands for."""
        convolution = self._convolution
        if isinstance(convolution, Naive):
            line = convolution.LINE_COLUMNS * convolution.lag_step
            count = (convolution.max_new_tokens - 1) // line
            middle = line * (count // 2 + count % 2)
            return [("inputs of a line put away", middle, count)] if count else []
        assert isinstance(convolution, _Filled)
        ends = self._page_ends()
        if isinstance(convolution, Continuous):
            return _by_tile(ends, self._first_position, ends.step)
        chosen = ends[len(ends) // (2 * MOST_FLUSHES) :: max(1, -(-len(ends) // MOST_FLUSHES))]
        counts = [
            len(ends) // len(chosen) + (i < len(ends) % len(chosen)) for i in range(len(chosen))
        ]
        return [
            (f"a fill from {end} positions", end, count)
            for end, count in zip(chosen, counts, strict=True)
        ]

    def _page_ends(self) -> range:
        """Positions, as the convolution counts them, that end a page and are not the last."""
        convolution = self._convolution
        assert isinstance(convolution, _Filled)
        page = convolution.page_columns * convolution.lag_step
        return range((self._first_position // page + 1) * page, convolution.max_new_tokens, page)


def _by_tile(ends: range, first: int, page: int) -> list[tuple[str, int, int]]:
    """Of each tile size, one in the middle of a run."""
    by_tile: dict[int, list[int]] = {}
    for end in ends:
        pages = end // page
        by_tile.setdefault(page * (pages & -pages), []).append(end - first)
    return [
        (f"a flush of {tile} positions", places[len(places) // 2], len(places))
        for tile, places in sorted(by_tile.items())
    ]
