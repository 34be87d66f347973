"""Batches of token shards for training: the tokens of each rank at each position, and resuming."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from stu.common.errors import UserError
from train.data.order import Permutation
from train.data.shards import TokenShards


class Batch(TypedDict):
    """Micro-batch for training. Inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`."""

    tokens: Tensor  # int64 [micro_batch_size, seq_len + 1]
    sample_ids: Tensor  # int64 [micro_batch_size], numbers of the samples in the epoch


class ValidationBatch(TypedDict):
    """Micro-batch for validation. Only the first `num_targets` targets of a sequence count."""

    tokens: Tensor  # int64 [micro_batch_size, seq_len + 1], padded with 0
    num_targets: Tensor  # int64 [micro_batch_size], 0 for a sequence that is only padding


@dataclass(eq=False)
class SampleStream(IterableDataset[Batch]):
    """Endless micro-batches of one rank, from a position on.

    Sample `i` of an epoch is the tokens `i * seq_len` to `(i+1) * seq_len`, both included: the last
    target of a sample is the first input of the next. Positions count samples over all epochs and
    ranks; position `j` holds sample `Permutation(n, seed, j // n)(j % n)` of `n`. From position `p`
    on, rank `r` of `R` with micro-batches of `m` reads positions `p + r*m` to `p + r*m + m-1`, then
    moves on by `R*m`. So a run that consumed `p` samples can continue with any `R` and `m`.

    Raises UserError if the shards are shorter than one sample.
    """

    shards: TokenShards
    seq_len: int
    micro_batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    position: int = 0

    def __post_init__(self) -> None:
        self.samples_per_epoch = (len(self.shards) - 1) // self.seq_len
        if self.samples_per_epoch < 1:
            raise UserError(
                "data.seq_len",
                self.seq_len,
                f"less than {len(self.shards)}, the number of training tokens",
                "lower it or prepare more text",
            )

    def __iter__(self) -> Iterator[Batch]:
        first = self.position + self.rank * self.micro_batch_size
        while True:
            ids = self._samples_at(first)
            windows = [
                self.shards.read(i * self.seq_len, (i + 1) * self.seq_len + 1) for i in ids.tolist()
            ]
            yield {
                "tokens": torch.from_numpy(np.stack(windows)),
                "sample_ids": torch.from_numpy(ids),
            }
            first += self.world_size * self.micro_batch_size

    def _samples_at(self, first: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the samples of the micro-batch at position `first`: `[m]`."""
        positions = np.arange(first, first + self.micro_batch_size, dtype=np.int64)
        epochs, within = np.divmod(positions, self.samples_per_epoch)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            order = Permutation(self.samples_per_epoch, self.seed, epoch)
            ids[epochs == epoch] = order(within[epochs == epoch])
        return ids


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


class TokenData(L.LightningDataModule):
    """Training and validation batches from a folder that `stu-prepare` made.

    Args:
        dir: Folder of token shards.
        seq_len: Input tokens of one sample.
        micro_batch_size: Samples that each rank processes at once.
        seed: Seed of the order of samples.
        max_validation_tokens: Largest number of targets in one validation, over all ranks; the
            first ones of the split are used.

    Raises UserError if a value is not allowed, or the folder is damaged or has less than a sample.
    """

    def __init__(
        self,
        dir: str,
        seq_len: int,
        micro_batch_size: int,
        seed: int = 0,
        max_validation_tokens: int = 1_000_000,
    ) -> None:
        super().__init__()
        for name, value in [
            ("seq_len", seq_len),
            ("micro_batch_size", micro_batch_size),
            ("max_validation_tokens", max_validation_tokens),
        ]:
            if value < 1:
                raise UserError(f"data.{name}", value, "at least 1")
        self.seq_len = seq_len
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.max_validation_tokens = max_validation_tokens
        self.train_shards = TokenShards(dir, "train")
        self.validation_shards = TokenShards(dir, "validation")
        self.accepted_changes: set[str] = set()
        """Names in `identity` whose values may differ from the checkpoint's."""
        self.ranks_per_sample = 1
        """Neighbouring ranks that read the same samples (`parallel.context`)."""
        self.position = 0
        """Samples consumed so far, over all ranks and epochs."""
        self.train_dataloader()  # fails now if seq_len is too long for the data

    @property
    def samples_per_epoch(self) -> int:
        return (len(self.train_shards) - 1) // self.seq_len

    @property
    def vocab_size(self) -> int:
        return self.train_shards.index.vocab_size

    @property
    def tokenizer_path(self) -> Path:
        return self.train_shards.tokenizer_path

    @property
    def tokenizer_sha256(self) -> str:
        return self.train_shards.index.tokenizer_sha256

    def advance(self, num_samples: int) -> None:
        """Count `num_samples`, over all ranks, as consumed.

        The training step calls this, as the loader may have fetched samples ahead.
        """
        self.position += num_samples

    def train_dataloader(self) -> SampleStream:
        """Return the endless micro-batches of this rank from `position` on."""
        ranks = self._rank_and_world_size()
        return SampleStream(
            self.train_shards, self.seq_len, self.micro_batch_size, self.seed, *ranks, self.position
        )

    def val_dataloader(self) -> ValidationSet:
        """Return the micro-batches of this rank for the first `max_validation_tokens` targets."""
        ranks = self._rank_and_world_size()
        tokens = self.max_validation_tokens
        return ValidationSet(
            self.validation_shards, self.seq_len, self.micro_batch_size, tokens, *ranks
        )

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, **self.identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of a checkpoint.

        Raises UserError if its run had another order of samples, unless that is accepted.
        """
        for name, value in self.identity().items():
            if state_dict.get(name, value) != value and name not in self.accepted_changes:
                raise UserError(
                    f"data.{name}",
                    message=f"data.{name} is {value!r}, but the checkpoint was made with "
                    f"{state_dict[name]!r}, so its position would mean other samples; use that "
                    f"{name}, or start a new run",
                )
        self.position = state_dict["position"]

    def identity(self) -> dict[str, Any]:
        """Return all values on which the samples at a position depend, by name."""
        return {
            "seed": self.seed,
            "seq_len": self.seq_len,
            "tokenizer_sha256": self.tokenizer_sha256,
            "num_tokens": len(self.train_shards),
            "contents": self._fingerprint,
        }

    @cached_property
    def _fingerprint(self) -> str:
        return self.train_shards.fingerprint()

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        count = self.ranks_per_sample
        return self.trainer.global_rank // count, self.trainer.world_size // count
