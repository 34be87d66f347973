"""Batches for training and validation: the samples of each rank at each position."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from train.data.order import SampleOrder
from train.data.shards import TokenShards


class Batch(TypedDict):
    """Micro-batch for training. Inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`."""

    tokens: Tensor  # int64 [micro_batch_size, seq_len + 1]
    sample_ids: (
        Tensor  # int64 [micro_batch_size], numbers of the samples in an epoch of all sources
    )


class ValidationBatch(TypedDict):
    """Micro-batch for validation. Only the first `num_targets` targets of a sequence count."""

    tokens: Tensor  # int64 [micro_batch_size, seq_len + 1], padded with 0
    num_targets: Tensor  # int64 [micro_batch_size], 0 for a sequence that is only padding


class Samples(Protocol):
    """Training samples of a source, by number: a way to cut its tokens into rows."""

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""

    def __getitem__(self, number: int) -> dict[str, NDArray[Any]]:
        """Return what a batch holds of a sample, in arrays of the same shapes for all samples.

        `tokens` are int64, `[seq_len + 1]`.
        """


@dataclass(frozen=True)
class Windows:
    """Samples that follow each other in the shards.

    Sample `i` is the tokens `i * seq_len` to `(i+1) * seq_len`, both included: the last target of a
    sample is the first input of the next.
    """

    shards: TokenShards
    seq_len: int

    def __len__(self) -> int:
        return max(0, (len(self.shards) - 1) // self.seq_len)

    def __getitem__(self, number: int) -> dict[str, NDArray[Any]]:
        start = number * self.seq_len
        return {"tokens": self.shards.read(start, start + self.seq_len + 1)}


@dataclass(eq=False)
class SampleStream(IterableDataset[Batch]):
    """Endless micro-batches of one rank, from a position on.

    Positions count samples over all epochs, sources and ranks; `order` says which sample is where.
    From position `p` on, rank `r` of `R` with micro-batches of `m` reads positions `p + r*m` to
    `p + r*m + m-1`, then moves on by `R*m`. So a run that consumed `p` samples can continue with
    any `R` and `m`.
    """

    sources: Sequence[Samples]
    order: SampleOrder
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1
    position: int = 0

    def __iter__(self) -> Iterator[Batch]:
        # The samples of all sources are numbered one source after the other.
        offsets = np.cumsum([0, *(len(samples) for samples in self.sources)])
        first = self.position + self.rank * self.micro_batch_size
        while True:
            positions = np.arange(first, first + self.micro_batch_size, dtype=np.int64)
            sources, numbers = self.order(positions)
            rows = [
                self.sources[source][number]
                for source, number in zip(sources.tolist(), numbers.tolist(), strict=True)
            ]
            batch = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
            batch["sample_ids"] = torch.from_numpy(offsets[sources] + numbers)
            yield cast(Batch, batch)
            first += self.world_size * self.micro_batch_size


@dataclass(frozen=True)
class ValidationSet:
    """Micro-batches of one rank for validation; all ranks together predict every target once.

    Window `w` predicts the targets `w * seq_len + 1` to `(w+1) * seq_len` (the last one may have
    fewer), as sequence `w % m` of a micro-batch of rank `(w // m) % R`. All ranks have the
    same number of micro-batches, as ranks must run in step under ZeRO-3; sequences without a window
    have `num_targets` 0.

    It is not a torch Dataset, as Lightning would replace the sampler of one.
    """

    shards: TokenShards
    seq_len: int
    micro_batch_size: int
    max_tokens: int
    rank: int = 0
    world_size: int = 1

    @property
    def num_targets(self) -> int:
        """Targets over all ranks."""
        return min(len(self.shards) - 1, self.max_tokens)

    def __len__(self) -> int:
        """Return the number of micro-batches of each rank."""
        num_windows = -(-self.num_targets // self.seq_len)
        return -(-num_windows // (self.world_size * self.micro_batch_size))

    def __iter__(self) -> Iterator[ValidationBatch]:
        m = self.micro_batch_size
        for batch in range(len(self)):
            first = (batch * self.world_size + self.rank) * m
            tokens = np.zeros((m, self.seq_len + 1), dtype=np.int64)
            num_targets = np.zeros(m, dtype=np.int64)
            for i in range(m):
                start = (first + i) * self.seq_len
                count = min(self.seq_len, self.num_targets - start)
                if count > 0:
                    tokens[i, : count + 1] = self.shards.read(start, start + count + 1)
                    num_targets[i] = count
            yield {
                "tokens": torch.from_numpy(tokens),
                "num_targets": torch.from_numpy(num_targets),
            }
