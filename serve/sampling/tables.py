"""Settings and token histories of the rows of a batch, in tensors that stay where they are."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Table = Literal["bias", "in_prompt", "new_counts", "allowed"]
WORD_BITS = 32


def table_layouts(vocab_size: int, most_new_tokens: int) -> dict[Table, tuple[int, torch.dtype]]:
    """Return the numbers in a row of each table over the vocabulary, and their dtype."""
    num_words = math.ceil(vocab_size / WORD_BITS)
    return {
        "bias": (vocab_size, torch.float32),
        "in_prompt": (num_words, torch.int32),
        "new_counts": (vocab_size, torch.int16 if most_new_tokens < 2**15 else torch.int32),
        "allowed": (num_words, torch.int32),
    }


def table_bytes(max_rows: int, vocab_size: int, most_new_tokens: int) -> int:
    """Return the bytes of all tables over the vocabulary, once requests have needed them."""
    sizes = table_layouts(vocab_size, most_new_tokens).values()
    return (max_rows + 1) * sum(size * dtype.itemsize for size, dtype in sizes)


class RowTables:
    """Tensors whose first dimension is the row. The row after the last, the null row, pads batches.

    Tables over the vocabulary are allocated by `reserve`, once a request needs them.

    Args:
        max_rows: Number of rows besides the null row.
        vocab_size: Number of tokens in the vocabulary.
        most_new_tokens: Most new tokens of a request.
        neutral: Settings of a row without a request, by name.
        device: Device of the tensors.
    """

    def __init__(
        self,
        max_rows: int,
        vocab_size: int,
        most_new_tokens: int,
        neutral: Mapping[str, float],
        device: torch.device,
    ) -> None:
        self.vocab_size, self.device = vocab_size, device
        self.columns = {name: column for column, name in enumerate(neutral)}
        """Columns of `settings`, by name."""
        self._num_rows, self._neutral = max_rows + 1, dict(neutral)
        self._num_words = math.ceil(vocab_size / WORD_BITS)
        self._layouts = table_layouts(vocab_size, most_new_tokens)
        self._tables: dict[Table, Tensor] = {}
        with torch.inference_mode(False):
            settings = torch.tensor(list(neutral.values()), dtype=torch.float64, device=device)
            self.settings = settings.repeat(self._num_rows, 1)
            """Settings, float64 `[rows, settings]`."""
            self.num_new = torch.zeros(self._num_rows, dtype=torch.int64, device=device)
            """Number of new tokens, kept while tokens may be forbidden."""
            bytes_ = np.arange(256, dtype=np.uint8)[:, None]
            bits = torch.from_numpy(np.unpackbits(bytes_, axis=1, bitorder="little")).bool()
            self.bits_of_byte = bits.to(device)
            """Bits of each byte, the lowest first, bool `[256, 8]`."""
            self.mask_of_byte = torch.zeros(256, 8).masked_fill(~bits, -torch.inf).to(device)
            """The same as numbers to add: 0 for a bit that is set, -inf for others."""

    def __getitem__(self, name: Table) -> Tensor:
        return self._tables[name]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that are allocated."""
        return [
            self.settings,
            self.num_new,
            self.bits_of_byte,
            self.mask_of_byte,
            *self._tables.values(),
        ]

    def reserve(self, names: Iterable[Table]) -> None:
        """Allocate those of these tables that are not yet allocated, with zeros."""
        for name in names:
            if name not in self._tables:
                size, dtype = self._layouts[name]
                with torch.inference_mode(False):
                    table = torch.zeros(self._num_rows, size, dtype=dtype, device=self.device)
                self._tables[name] = table

    def write_settings(self, row: int, settings: Mapping[str, float], num_new: int) -> None:
        """Write the settings of a row, neutral where none is given, and its number of tokens."""
        values = list((self._neutral | dict(settings)).values())
        self.settings[row].copy_(self.upload(torch.tensor(values, dtype=torch.float64)))
        self.num_new[row].fill_(num_new)

    def write_bias(self, row: int, bias: Mapping[int, float]) -> None:
        """Write the numbers to add to the logits. Without the table there are none."""
        if "bias" not in self._tables:
            assert not bias, "the table of biases is not reserved"
            return
        table = self._tables["bias"]
        table[row].zero_()
        if bias:
            ids = self.upload(torch.tensor(list(bias)))
            values = self.upload(torch.tensor(list(bias.values()), dtype=torch.float32))
            table[row].index_copy_(0, ids, values)

    def write_counts(self, row: int, tokens: Sequence[int]) -> None:
        """Write how often each token is among `tokens`."""
        counts = np.bincount(np.array(tokens, dtype=np.int64), minlength=self.vocab_size)
        table = self._tables["new_counts"]
        table[row].copy_(self.upload(torch.from_numpy(counts).to(table.dtype)))

    def write_bits(self, name: Table, rows: Sequence[int], words: np.ndarray) -> None:
        """Write rows of a table of bits: int32 `[len(rows), words]`."""
        places = self.upload(torch.tensor(rows))
        self._tables[name].index_copy_(0, places, self.upload(torch.from_numpy(words)))

    def upload(self, values: Tensor) -> Tensor:
        """Copy `values` from the host without waiting for the device."""
        if self.device.type == "cpu":
            return values
        return values.pin_memory().to(self.device, non_blocking=True)

    def pack(self, tokens: Iterable[int]) -> np.ndarray:
        """Return a bit mask with these tokens: int32 `[words]`."""
        mask = np.zeros(self._num_words * WORD_BITS, dtype=np.bool_)
        mask[list(tokens)] = True
        return np.packbits(mask, bitorder="little").view(np.int32)


@dataclass(frozen=True)
class Batch:
    """Rows of a step, as sampling options see them."""

    tables: RowTables
    rows: Tensor
    """Rows `[B]`, int64."""
    logits: Tensor
    """Logits `[B, vocab_size]`; where options change weights, with all changes to them."""
    fields: frozenset[str]
    """Fields of `SamplingParams` that some of the rows may use."""
    most_kept: int
    """Most tokens that a row's top-k keeps."""

    def part(self, first: int, end: int) -> "Batch":
        """Return the rows from `first` to before `end`."""
        return replace(self, rows=self.rows[first:end], logits=self.logits[first:end])

    def column(self, name: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return a setting of each row, `[B, 1]`."""
        column = self.tables.settings[:, self.tables.columns[name]]
        return column.index_select(0, self.rows)[:, None].to(dtype)

    def bias(self) -> Tensor:
        """Return the numbers to add to the logits, float32 `[B, vocab_size]`."""
        return self.tables["bias"].index_select(0, self.rows)

    def new_counts(self) -> Tensor:
        """Return how often each token is in the new text, integers `[B, vocab_size]`."""
        return self.tables["new_counts"].index_select(0, self.rows)

    def in_prompt(self) -> Tensor:
        """Return which tokens are in the prompt, bool `[B, vocab_size]`."""
        words = self.tables["in_prompt"].index_select(0, self.rows)
        return self._of_bits(words, self.tables.bits_of_byte)

    def mask(self) -> Tensor:
        """Return 0 for tokens that may come next, -inf for others, float32 `[B, vocab_size]`."""
        num_new = self.tables.num_new.index_select(0, self.rows)[:, None]
        is_free = num_new >= self.column("masked_tokens", torch.int64)
        words = self.tables["allowed"].index_select(0, self.rows)
        return self._of_bits(words | -is_free.int(), self.tables.mask_of_byte)

    def _of_bits(self, words: Tensor, of_byte: Tensor) -> Tensor:
        """Return the values of bits `[B, vocab_size]`, from those of the 8 bits of each byte."""
        values = of_byte.index_select(0, words.view(torch.uint8).flatten().int())
        return values.view(len(words), -1)[:, : self.tables.vocab_size]
