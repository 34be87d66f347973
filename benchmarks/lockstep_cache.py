"""Unpaged convolution caches of a batch that starts together, behind the paged one's interface."""

import torch
from torch import Tensor

from stu.futurefill import Naive, OnlineConvolution


class LockstepCache:
    """`serve.cache.ConvolutionCache`'s calls on `convolution`, whose rows step together."""

    def __init__(self, convolution: OnlineConvolution) -> None:
        self._convolution = convolution
        self._rows: dict[int, int] = {}

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
        if isinstance(convolution, Naive):
            if not convolution._inputs.is_contiguous() or convolution._inputs[..., -1].sum() == 0:
                with torch.inference_mode():  # memory that was never written reads too fast
                    convolution._inputs[..., convolution.taps.shape[1] :].normal_()
        else:
            epoch = convolution.page_columns * convolution.lag_step  # type: ignore[attr-defined]
            convolution._place = position % epoch  # type: ignore[attr-defined]

    def flush_positions(self, most: int) -> list[tuple[int, int, int]]:
        """Past lengths at some of the epochs' ends, the position just before each, and how many
        ends each stands for."""
        if isinstance(self._convolution, Naive):
            return []
        convolution = self._convolution
        epoch = convolution.page_columns * convolution.lag_step  # type: ignore[attr-defined]
        ends = range(epoch, convolution.max_new_tokens, epoch)
        chosen = ends[:: max(1, len(ends) // most)]
        counts = [
            len(ends) // len(chosen) + (i < len(ends) % len(chosen)) for i in range(len(chosen))
        ]
        return [(end, end - 1, count) for end, count in zip(chosen, counts, strict=True)]
