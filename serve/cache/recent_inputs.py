"""Caches of short convolutions: the last few inputs of every sequence in every layer.

They are too few to be paged: each sequence has one place for them, from its admission until its
release.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from serve.cache.base import Cache, CacheSize, num_rows
from serve.config import EngineConfig
from stu.convolution import after_zeros, short_convolution
from stu.mixers import LastInputs, remembered
from stu.model import FlashSTU


class RecentInputs(Cache):
    """The last inputs of several layers' short convolutions, for up to `max_rows` sequences.

    A sequence counts from its admission, before it joins the batch.
    """

    def __init__(
        self,
        layers: Sequence[LastInputs],
        max_rows: int,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
    ) -> None:
        # The last place is for padding rows.
        self._inputs = [
            torch.zeros(
                max_rows + 1, layer.num_taps - 1, layer.channels, dtype=dtype, device=device
            )
            for layer in layers
        ]
        self._padding, self._max_rows = max_rows, max_rows
        self._free = list(range(max_rows))
        self._places: dict[int, int] = {}
        self._rows: list[int] = []
        """Place of each row's sequence."""
        self._index = self._places_of_rows()
        """`_rows` as a tensor, padded with the padding place to `max_rows`."""

    @classmethod
    def size(cls, model: FlashSTU, config: EngineConfig) -> CacheSize | None:
        layers = remembered(model.mixers, LastInputs)
        numbers = sum((layer.num_taps - 1) * layer.channels for layer in layers)
        fixed = (num_rows(config) + 1) * numbers * model.embedding.weight.element_size()
        return CacheSize(fixed) if layers else None

    @classmethod
    def make(cls, model: FlashSTU, config: EngineConfig, num_pages: int) -> "RecentInputs":
        weight, layers = model.embedding.weight, remembered(model.mixers, LastInputs)
        return cls(layers, num_rows(config), weight.dtype, weight.device)

    @property
    def num_bytes(self) -> int:
        return sum(inputs.nbytes for inputs in self._inputs)

    def admit(self, owner: int, prompt_tokens: int, new_tokens: int) -> None:
        self._places[owner] = self._free.pop()

    def release(self, owner: int) -> None:
        place = self._places.pop(owner)
        assert place not in self._rows, f"sequence {owner} is still in the batch"
        self._free.append(place)

    def prefill(self, owner: int, layer: int, inputs: Tensor, taps: Tensor) -> Tensor:
        """Return the outputs `[1, P, C]` of a prompt, and keep its last inputs."""
        extended = after_zeros(inputs, len(taps))  # [1, J - 1 + P, C]
        self._inputs[layer][self._places[owner]] = extended[0, inputs.shape[1] :]
        return short_convolution(extended, taps)

    def join(self, owner: int) -> None:
        self._rows.append(self._places[owner])
        self._index = self._places_of_rows()

    def leave(self, row: int) -> None:
        self._rows[row] = self._rows[-1]
        self._rows.pop()
        self._index = self._places_of_rows()

    def step(self, layer: int, inputs: Tensor, taps: Tensor, first_row: int = 0) -> Tensor:
        """Return the outputs `[B, 1, C]` of one token of the rows from `first_row`.

        inputs: `[B, 1, C]`. Rows beyond those of the batch are padding, with any finite input.
        """
        places = self._index[first_row : first_row + len(inputs)]
        extended = torch.cat([self._inputs[layer][places], inputs], dim=1)  # [B, J, C]
        self._inputs[layer][places] = extended[:, 1:]
        return short_convolution(extended, taps)

    def _places_of_rows(self) -> Tensor:
        missing = self._max_rows - len(self._rows)
        places = self._rows + [self._padding] * missing
        return torch.tensor(places, device=self._inputs[0].device)
