"""Unpaged convolution caches of a batch that starts together, behind the paged one's interface."""

import torch
from torch import Tensor

from stu.futurefill import Naive, OnlineConvolution, _Filled

MOST_FLUSHES = 4


class LockstepCache:
    """`serve.cache.ConvolutionCache`'s calls on `convolution`, whose rows step together."""

    def __init__(self, convolution: OnlineConvolution) -> None:
        self._convolution = convolution
        self._rows: dict[int, int] = {}
        self._is_written = False
        self.flushes: dict[int, tuple[int, float]] = {}
        """None of tiles."""

    def pages_needed(self, new_tokens: int) -> int:
        """None: its memory is its own."""
        return 0

    def admit(self, owner: int, new_tokens: int) -> None:
        """Give `owner` the next row."""
        self._rows[owner] = len(self._rows)

    def prefill(self, owner: int, layer: int, inputs: Tensor) -> Tensor:
        """Take a prompt `[1, P, D]`."""
        row = self._rows[owner]
        return self._convolution.prefill(layer, inputs, slice(row, row + 1))

    def join(self, owner: int) -> None:
        """All rows were admitted in the order in which they join."""

    def step(self, layer: int, inputs: Tensor, first_row: int = 0) -> Tensor:
        """One token of every row."""
        return self._convolution.step(layer, inputs)

    def advance(self) -> None:
        """Every layer has stepped."""
        self._convolution.advance()

    def seek(self, position: int) -> None:
        """Go on as if so many new tokens had been decoded."""
        convolution = self._convolution
        convolution.position = position
        if isinstance(convolution, _Filled):
            convolution._place = position % (convolution.page_columns * convolution.lag_step)
        elif isinstance(convolution, Naive) and not self._is_written:
            self._is_written = True
            with torch.inference_mode():  # memory that was never written to reads too fast
                for stream in convolution._inputs[..., convolution.taps.shape[1] :].flatten(0, 2):
                    stream.fill_(0.1)

    def sampled_flushes(self) -> list[tuple[str, int, int]]:
        """Some of the ends of epochs: what happens there, where, and how many each stands for."""
        convolution = self._convolution
        if not isinstance(convolution, _Filled):
            return []
        epoch = convolution.page_columns * convolution.lag_step
        ends = range(epoch, convolution.max_new_tokens, epoch)
        chosen = ends[len(ends) // (2 * MOST_FLUSHES) :: max(1, -(-len(ends) // MOST_FLUSHES))]
        counts = [
            len(ends) // len(chosen) + (i < len(ends) % len(chosen)) for i in range(len(chosen))
        ]
        return [
            (f"a fill from {end} positions", end, count)
            for end, count in zip(chosen, counts, strict=True)
        ]
