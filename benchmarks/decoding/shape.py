"""Shapes of decoding runs, and the memory that their caches take."""

from dataclasses import dataclass

from benchmarks.peers.peer import FLOAT_BYTES
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.decoding.memory import pages_for, window_pages
from stu.futurefill import usual_epoch
from stu.mixers import KeyWindow, LastInputs, PastInputs, planned_mixers, remembered
from stu.online_convolution import Naive

PAGE_LEN = 32
"""Positions of a page of the engine's caches."""
PAGE_COLUMNS = 32
"""Columns of a page of `stu.futurefill.Continuous`."""


@dataclass(frozen=True)
class Shape:
    """Convolutions of a batch that decodes in step. Raises UserError for a model without any."""

    config: ModelConfig
    batch: int
    prompt_tokens: int
    new_tokens: int

    def __post_init__(self) -> None:
        if not remembered(planned_mixers(self.config), PastInputs):
            raise UserError("layout", self.config.layout, "one with long convolutions")

    @property
    def lag_step(self) -> int:
        """Distance between taps, in positions."""
        return remembered(planned_mixers(self.config), PastInputs)[0].lag_step

    @property
    def num_pages(self) -> int:
        """Pages of a sequence; its first new token comes with the prompt."""
        return pages_for(self.new_tokens - 1, PAGE_LEN)

    def cache_bytes(self, cache: str) -> int:
        """Return the bytes that a cache which is not the engine's allocates for the batch.

        Direct sums hold all inputs, and the latest once more. Other caches hold a slot for each new
        token (`flashinference`: also for each prompt token) and two pages for the current one.
        """
        channels = len(remembered(planned_mixers(self.config), PastInputs)) * self.config.width
        prompt = -(-self.prompt_tokens // self.lag_step)
        columns = -(-self.new_tokens // self.lag_step)
        if cache == "naive":
            columns += prompt + Naive.LINE_COLUMNS
        else:
            if cache == "flashinference":
                columns = -(-(self.prompt_tokens + self.new_tokens) // self.lag_step)
            epoch = usual_epoch(columns)
            columns += 2 * min(epoch if cache == "epoched" else PAGE_COLUMNS, columns)
        return channels * FLOAT_BYTES * self.batch * self.lag_step * columns

    def other_bytes(self) -> int:
        """Return the bytes of attention windows, null page included, and of short convolutions."""
        mixers = planned_mixers(self.config)
        windows, short = remembered(mixers, KeyWindow), remembered(mixers, LastInputs)
        numbers = sum((layer.num_taps - 1) * layer.channels for layer in short) * (self.batch + 1)
        if windows:
            num_pages = pages_for(self.prompt_tokens + self.new_tokens, PAGE_LEN)
            num_pages = (
                self.batch * min(num_pages, window_pages(windows[0].window_tokens, PAGE_LEN)) + 1
            )
            numbers += num_pages * 2 * len(windows) * self.config.width * PAGE_LEN
        return numbers * FLOAT_BYTES
