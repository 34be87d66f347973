"""Batches for training and validation: the samples of each rank at each position."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from train.data.order import SampleOrder
from train.data.rows.packing import PackedRows
from train.data.shards import TokenShards


class Rows(TypedDict, total=False):
    """Parts of a micro-batch that it has only if documents are kept apart or packed."""

    counted: Tensor  # bool [micro_batch_size, seq_len], whether a target counts
    document_lengths: list[list[int]]  # inputs of each document of each row, to keep them apart
    mean_counted: float  # targets that count in a micro-batch of the step, on average; no tensor,
    # as strategies cast tensors to 16 bits


class Batch(Rows):
    """Micro-batch for training. Inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`."""

    tokens: Tensor  # int64 [micro_batch_size, seq_len + 1]
    sample_ids: (
        Tensor  # int64 [micro_batch_size], numbers of the samples in an epoch of all sources
    )


class ValidationBatch(Rows):
    """Micro-batch for validation. Only the first `num_targets` targets of a sequence count."""

    tokens: Tensor  # int64 [micro_batch_size, seq_len + 1], padded with 0
    num_targets: Tensor  # int64 [micro_batch_size], 0 for a sequence that is only padding


class Samples(Protocol):
    """Training samples of a source, by number: a way to cut its tokens into rows."""

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return what a batch holds of a sample, in arrays of the same shapes for all samples, or
        in lists.

        `tokens` are int64, `[seq_len + 1]`.
        """


@dataclass(frozen=True)
class Boundaries:
    """Boundaries between the documents of a row."""

    are_kept: bool = False
    """Whether documents are kept apart."""
    mark: int | None = None
    """First token of every document. As a target, it says that the document before it ends.
    Without a mark, the first token of a document is no target where documents are kept apart."""

    def describe(
        self, shards: TokenShards, start: int, count: int, row_tokens: int
    ) -> dict[str, Any]:
        """Return what a batch holds of a row besides its tokens, for `count` inputs from `start` on
        and padding."""
        if not self.are_kept:
            return {}
        padding = [row_tokens - count] if count < row_tokens else []
        lengths = shards.documents.lengths(start, start + count) if count else []
        found: dict[str, Any] = {"document_lengths": lengths + padding}
        if self.mark is None:
            counted = np.ones(row_tokens, dtype=np.bool_)
            counted[shards.documents.between(start + 1, start + count + 1) - start - 1] = False
            found["counted"] = counted
        return found


@dataclass(frozen=True)
class Windows:
    """Samples that follow each other in the shards.

    Sample `i` is the tokens `i * seq_len` to `(i+1) * seq_len`, both included: the last target of a
    sample is the first input of the next.
    """

    shards: TokenShards
    seq_len: int
    boundaries: Boundaries = Boundaries()
    has_answers: bool = False
    """Whether a source of the data has conversations, so that all samples say what counts."""

    def __len__(self) -> int:
        return max(0, (len(self.shards) - 1) // self.seq_len)

    def __getitem__(self, number: int) -> dict[str, Any]:
        start, length = number * self.seq_len, self.seq_len
        tokens = self.shards.read(start, start + length + 1)
        row = {"tokens": tokens, **self.boundaries.describe(self.shards, start, length, length)}
        if self.has_answers:
            row["counted"] = only_answers(row.get("counted"), self.shards, start, length, length)
        return row


def only_answers(
    counted: NDArray[np.bool_] | None, shards: TokenShards, start: int, count: int, row_tokens: int
) -> NDArray[np.bool_]:
    """Return which targets of a row count: of those in `counted`, or of all, the ones that belong
    to answers if the shards have conversations. The row has `count` inputs from `start` on."""
    found = np.ones(row_tokens, dtype=np.bool_) if counted is None else counted.copy()
    if shards.answers is not None:
        found[:count] &= shards.answers[start + 1 : start + count + 1] != 0
    return found


class PackedDocuments:
    """Samples that hold whole documents, where they fit, and padding.

    Targets count as in `Windows`; those of padding do not.
    """

    def __init__(self, shards: TokenShards, seq_len: int, boundaries: Boundaries) -> None:
        self._shards, self._seq_len, self._boundaries = shards, seq_len, boundaries
        self._rows = PackedRows(shards.documents, seq_len)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        mark, seq_len = self._boundaries.mark, self._seq_len
        tokens = np.full(seq_len + 1, mark or 0, dtype=np.int64)
        counted = np.zeros(seq_len, dtype=np.bool_)
        lengths, place = [], 0
        for start, count in self._rows[number]:
            end = place + count
            if place and not len(self._shards.documents.between(start, start + 1)):
                counted[place - 1] = False  # the rest of a cut document is no next document
            # With the token after it, which is the next document's mark unless a cut is there.
            after = self._shards.read(start, min(start + count + 1, len(self._shards)))
            tokens[place : place + len(after)] = after
            stop = start + count
            is_cut = stop < len(self._shards) and not len(
                self._shards.documents.between(stop, stop + 1)
            )
            counted[place : end - 1] = True
            counted[end - 1] = is_cut or mark is not None
            lengths.append(count)
            place = end
        if place < seq_len:
            tokens[place:] = mark or 0
            lengths.append(seq_len - place)
        sample: dict[str, Any] = {"tokens": tokens, "counted": counted}
        return sample | ({"document_lengths": lengths} if self._boundaries.are_kept else {})


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return rows as a batch."""
    return {
        key: values if isinstance(values[0], list) else torch.from_numpy(np.stack(values))
        for key, values in ((key, [row[key] for row in rows]) for key in rows[0])
    }


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
    micro_batches: int | None = None
    """Micro-batches that each rank sums up for a step, the first one at `position`, if the loss of
    a step is the mean over its targets that count; None if it is that over all targets."""

    def __iter__(self) -> Iterator[Batch]:
        # The samples of all sources are numbered one source after the other.
        offsets = np.cumsum([0, *(len(samples) for samples in self.sources)])
        step_size = self.world_size * self.micro_batch_size  # of all ranks' micro-batches
        for number in itertools.count():
            first = self.position + number * step_size + self.rank * self.micro_batch_size
            positions = np.arange(first, first + self.micro_batch_size, dtype=np.int64)
            sources, numbers = self.order(positions)
            rows = [
                self.sources[source][number]
                for source, number in zip(sources.tolist(), numbers.tolist(), strict=True)
            ]
            batch = collate(rows)
            batch["sample_ids"] = torch.from_numpy(offsets[sources] + numbers)
            if self.micro_batches is not None:
                if number % self.micro_batches == 0:
                    mean = self._mean_counted(self.position + number * step_size)
                batch["mean_counted"] = mean
            yield cast(Batch, batch)

    def _mean_counted(self, first: int) -> float:
        """Return the mean number of targets that count in the micro-batches, on all ranks, of the
        step that begins at position `first`."""
        assert self.micro_batches is not None
        count = self.world_size * self.micro_batches
        sources, numbers = self.order(
            np.arange(first, first + count * self.micro_batch_size, dtype=np.int64)
        )
        samples = zip(sources.tolist(), numbers.tolist(), strict=True)
        return sum(_num_counted(self.sources[s], n) for s, n in samples) / count


def _num_counted(samples: Samples, number: int) -> int:
    """Return the number of targets of a sample that count. Every rank asks this of the samples of
    all, so that no more is read than must be."""
    if not isinstance(samples, Windows) or samples.boundaries.are_kept:
        return int(samples[number]["counted"].sum())
    if samples.shards.answers is None:
        return samples.seq_len
    start = number * samples.seq_len + 1
    return int(np.count_nonzero(samples.shards.answers[start : start + samples.seq_len]))


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
    boundaries: Boundaries = Boundaries()

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
            yield cast(ValidationBatch, collate([self._row(first + i) for i in range(m)]))

    def _row(self, window: int) -> dict[str, Any]:
        tokens = np.zeros(self.seq_len + 1, dtype=np.int64)
        start = window * self.seq_len
        count = max(0, min(self.seq_len, self.num_targets - start))
        if count:
            tokens[: count + 1] = self.shards.read(start, start + count + 1)
        others = self.boundaries.describe(self.shards, start, count, self.seq_len)
        if self.shards.answers is not None:
            settings = self.shards, start, count, self.seq_len
            others["counted"] = only_answers(others.get("counted"), *settings)
        return {"tokens": tokens, "num_targets": np.int64(count), **others}
