"""Caches of short convolutions: the last few inputs of every row in every layer.

They are too few to be paged: each row has a place for them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from serve.cache.base import Cache, CachePlan, DraftedToken, Snapshot, num_rows
from serve.cache.static_step import StaticStep
from serve.config import EngineConfig
from stu.convolution import short_convolution
from stu.decoding.memory import last_input_size
from stu.mixers import LastInputs, remembered
from stu.model import FlashSTU


class RecentInputs(Cache):
    """The last inputs of several layers' short convolutions, for up to `max_rows` rows."""

    def __init__(
        self,
        layers: Sequence[LastInputs],
        max_rows: int,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
    ) -> None:
        # The last row is for padding.
        self._inputs = [
            torch.zeros(
                max_rows + 1, layer.num_taps - 1, layer.channels, dtype=dtype, device=device
            )
            for layer in layers
        ]
        self._max_rows = max_rows
        self._rows: list[int] = []
        """Rows of the batch."""
        self._index = torch.full((max_rows,), max_rows, device=device)
        """`_rows` as a tensor, filled up to `max_rows` with the row for padding."""
        self._tokens: list[DraftedToken] = []
        """Tokens of the step, if it takes several of a row."""
        self._seen: dict[tuple[int, int], list[Tensor]] = {}
        """Last inputs by row and layer, before these tokens and after each of them."""

    @classmethod
    def plan(cls, model: FlashSTU, config: EngineConfig) -> CachePlan | None:
        weight, layers = model.embedding.weight, remembered(model.mixers, LastInputs)
        if not layers:
            return None
        rows = num_rows(config)
        return CachePlan(
            last_input_size(layers, rows, weight.element_size()),
            lambda _: cls(layers, rows, weight.dtype, weight.device),
        )

    @property
    def num_bytes(self) -> int:
        return sum(inputs.nbytes for inputs in self._inputs)

    def admit(self, row: int, prompt_tokens: int, new_tokens: int) -> None:
        for inputs in self._inputs:
            inputs[row] = 0

    def prefill(self, row: int, layer: int, inputs: Tensor, taps: Tensor) -> Tensor:
        """Return the outputs `[1, T, C]` of a chunk of a prompt, and keep its last inputs."""
        extended = torch.cat([self._inputs[layer][None, row], inputs], dim=1)  # [1, J - 1 + T, C]
        self._inputs[layer][row] = extended[0, inputs.shape[1] :]
        return short_convolution(extended, taps)

    def snapshot(self, row: int, num_tokens: int) -> Snapshot:
        return Snapshot(num_tokens, tuple(inputs[row].clone() for inputs in self._inputs))

    def restore(self, row: int, snapshot: Snapshot) -> None:
        for inputs, kept in zip(self._inputs, snapshot.tensors, strict=True):
            inputs[row] = kept

    def begin_step(self, rows: list[int], alone: bool) -> None:
        if rows != self._rows:
            self._rows = list(rows)
            padding = [self._max_rows] * (self._max_rows - len(rows))
            self._index = torch.tensor(self._rows + padding, device=self._inputs[0].device)

    def step(self, layer: int, inputs: Tensor, taps: Tensor, first: int = 0) -> Tensor:
        """Return the outputs `[B, 1, C]` of one token of the rows from the `first` of the batch.

        inputs: `[B, 1, C]`. Those beyond the rows of the batch are padding, with any finite input.
        """
        if self._tokens:
            return self._step_drafts(layer, inputs, taps, first)
        rows = self._index[first : first + len(inputs)]
        extended = torch.cat([self._inputs[layer][rows], inputs], dim=1)  # [B, J, C]
        self._inputs[layer][rows] = extended[:, 1:]
        return short_convolution(extended, taps)

    def begin_drafts(self, tokens: Sequence[DraftedToken], alone: bool) -> None:
        self._tokens = list(tokens)
        layers = range(len(self._inputs))
        rows = {row for row, _ in tokens}
        self._seen = {(row, i): [self._inputs[i][row].clone()] for row in rows for i in layers}

    def keep(self, row: int, num_tokens: int) -> None:
        for layer, inputs in enumerate(self._inputs):
            inputs[row] = self._seen[row, layer][num_tokens]

    def advance_drafts(self) -> None:
        self._tokens = []

    def _step_drafts(self, layer: int, inputs: Tensor, taps: Tensor, first: int) -> Tensor:
        """Do as `step`, for the tokens of the step of drafts from the `first`."""
        outputs = torch.zeros_like(inputs)
        for place, (row, _) in enumerate(self._tokens[first : first + len(inputs)]):
            seen = self._seen[row, layer]
            extended = torch.cat([seen[-1], inputs[place]])  # [J, C]
            seen.append(extended[1:])
            outputs[place] = short_convolution(extended[None], taps)[0]
        return outputs

    def static_step(self) -> "RecentStep":
        return RecentStep(self._inputs)


class RecentStep(StaticStep):
    """Static step of `RecentInputs`, whose last row is for padding."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = inputs

    def begin(self, rows: Tensor, shared: Tensor, own: Tensor) -> None:
        self._rows = rows.clamp(max=len(self._inputs[0]) - 1)

    def step(self, layer: int, inputs: Tensor, taps: Tensor) -> Tensor:
        """Return the outputs of one token of the rows, `[B, 1, C]` both ways."""
        earlier = self._inputs[layer].index_select(0, self._rows)
        extended = torch.cat([earlier, inputs], dim=1)  # [B, J, C]
        self._inputs[layer].index_copy_(0, self._rows, extended[:, 1:])
        return short_convolution(extended, taps)
