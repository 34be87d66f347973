"""The caches of some rows, as the model's layers ask them while an engine runs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from serve.cache.budget import Caches
from serve.cache.static_step import StaticStep
from stu.mixers import KeyWindow, LastInputs, Memory, PastInputs, Remembered


class PromptMemory(Memory):
    """Chunks of prompts, concatenated. Each has a row and a length."""

    def __init__(self, caches: Caches, rows: Sequence[int], lengths: Sequence[int]) -> None:
        self._caches, self._rows, self._lengths = caches, rows, list(lengths)

    def continue_convolution(self, number: int, streams: Tensor) -> Tensor:
        convolution = self._caches.convolution
        assert convolution is not None
        outputs = torch.empty_like(streams)  # [S, T, C]
        for row, inputs, output in self._by_prompt(streams, outputs):
            output.copy_(convolution.prefill(row, number, inputs))
        return outputs

    def continue_short_convolution(self, number: int, inputs: Tensor, taps: Tensor) -> Tensor:
        recent = self._caches.recent
        assert recent is not None
        outputs = torch.empty_like(inputs)  # [1, T, C]
        for row, part, output in self._by_prompt(inputs, outputs):
            output.copy_(recent.prefill(row, number, part, taps))
        return outputs

    def continue_attention(
        self, number: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        attention = self._caches.attention
        assert attention is not None
        outputs = torch.empty_like(queries)  # [1, T, heads, head_dim]
        for row, q, k, v, output in self._by_prompt(queries, keys, values, outputs):
            output.copy_(attention.prefill(row, number, q, k, v))
        return outputs

    def _by_prompt(self, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """Yield each prompt's row, and its part of each tensor."""
        parts = (torch.split(tensor, self._lengths, dim=1) for tensor in tensors)
        return zip(self._rows, *parts, strict=True)


class RowMemory(Memory):
    """One token of the rows from the `first` of the batch, padding included."""

    def __init__(self, caches: Caches, first: int) -> None:
        self._caches, self._first = caches, first

    def continue_convolution(self, number: int, streams: Tensor) -> Tensor:
        convolution = self._caches.convolution
        assert convolution is not None
        return convolution.step(number, streams[:, 0], self._first)[:, None]

    def continue_short_convolution(self, number: int, inputs: Tensor, taps: Tensor) -> Tensor:
        recent = self._caches.recent
        assert recent is not None
        return recent.step(number, inputs, taps, self._first)

    def continue_attention(
        self, number: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        attention = self._caches.attention
        assert attention is not None
        return attention.step(number, queries, keys, values, self._first)


class StaticMemory(Memory):
    """One token of the rows of static steps that have begun."""

    def __init__(self, steps: Mapping[type[Remembered], StaticStep]) -> None:
        self._steps: Mapping[type[Remembered], Any] = steps

    def continue_convolution(self, number: int, streams: Tensor) -> Tensor:
        outputs: Tensor = self._steps[PastInputs].step(number, streams[:, 0])
        return outputs[:, None]

    def continue_short_convolution(self, number: int, inputs: Tensor, taps: Tensor) -> Tensor:
        outputs: Tensor = self._steps[LastInputs].step(number, inputs, taps)
        return outputs

    def continue_attention(
        self, number: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        outputs: Tensor = self._steps[KeyWindow].step(number, queries, keys, values)
        return outputs
