"""Reading token shards for training: which tokens each rank gets at each position, and resuming."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from train.data.order import Permutation
from train.data.shards import TokenShards


class Batch(TypedDict):
    """One micro-batch for training. Inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`."""

    tokens: Tensor  # int64 [micro_batch_size, seq_len + 1]
    sample_ids: Tensor  # int64 [micro_batch_size]: which sample of the epoch each row is


class ValidationBatch(TypedDict):
    """One micro-batch for validation. Only the first `num_targets` targets of a row count."""

    tokens: Tensor  # int64 [micro_batch_size, seq_len + 1], 0 where there is no token
    num_targets: Tensor  # int64 [micro_batch_size], 0 for a row that is only there for the shape


class SampleStream(IterableDataset[Batch]):
    """The micro-batches of one rank, from a position on, without end.

    Sample `i` of an epoch is tokens `i * seq_len` to `(i+1) * seq_len`, the last one included: each
    sample's last target is the next one's first input. Positions count samples over all epochs and
    ranks; position `j` holds sample `Permutation(n, seed, j // n)(j % n)` of `n`. From position `p`
    on, rank `r` of `R` with micro-batches of `m` reads positions `p + r*m` to `p + r*m + m-1`, then
    moves on by `R*m`. So a run that consumed `p` samples can go on with any `R` and `m`.

    Raises ValueError if the shards are shorter than one sample.
    """

    def __init__(
        self,
        shards: TokenShards,
        seq_len: int,
        micro_batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        position: int = 0,
    ) -> None:
        self.samples_per_epoch = (len(shards) - 1) // seq_len
        if self.samples_per_epoch < 1:
            raise ValueError(
                f"seq_len {seq_len}: the {len(shards)} tokens for training hold no sample of "
                f"{seq_len + 1}; lower seq_len or prepare more text"
            )
        self._shards = shards
        self._seq_len = seq_len
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._first = position + rank * micro_batch_size
        self._stride = world_size * micro_batch_size

    def __iter__(self) -> Iterator[Batch]:
        first = self._first
        while True:
            ids = self._samples_at(first)
            windows = [
                self._shards.read(i * self._seq_len, (i + 1) * self._seq_len + 1)
                for i in ids.tolist()
            ]
            yield {
                "tokens": torch.from_numpy(np.stack(windows)),
                "sample_ids": torch.from_numpy(ids),
            }
            first += self._stride

    def _samples_at(self, first: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The samples at positions `first` and on, which may lie in several epochs: `[m]`."""
        positions = np.arange(first, first + self._micro_batch_size, dtype=np.int64)
        epochs, within = np.divmod(positions, self.samples_per_epoch)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            order = Permutation(self.samples_per_epoch, self._seed, epoch)
            ids[epochs == epoch] = order(within[epochs == epoch])
        return ids


class ValidationSet:
    """One rank's share of the validation split: every target once, in windows side by side.

    Window `w` predicts targets `w * seq_len + 1` to `(w+1) * seq_len`, the last one what is left,
    and is row `w % m` of a batch of rank `(w // m) % R`. Every rank has the same number of batches,
    since under ZeRO-3 ranks must run in step; rows without a window have `num_targets` 0.

    Not a torch Dataset: Lightning would put its own sampler around one.
    """

    def __init__(
        self,
        shards: TokenShards,
        seq_len: int,
        micro_batch_size: int,
        max_tokens: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_targets = min(len(shards) - 1, max_tokens)
        """Tokens predicted over all ranks."""
        self._shards = shards
        self._seq_len = seq_len
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._stride = world_size * micro_batch_size

    def __len__(self) -> int:
        """Batches of each rank."""
        num_windows = -(-self.num_targets // self._seq_len)
        return -(-num_windows // self._stride)

    def __iter__(self) -> Iterator[ValidationBatch]:
        m = self._micro_batch_size
        for batch in range(len(self)):
            first = batch * self._stride + self._rank * m
            tokens = np.zeros((m, self._seq_len + 1), dtype=np.int64)
            num_targets = np.zeros(m, dtype=np.int64)
            for row in range(m):
                start = (first + row) * self._seq_len
                count = min(self._seq_len, self.num_targets - start)
                if count > 0:
                    tokens[row, : count + 1] = self._shards.read(start, start + count + 1)
                    num_targets[row] = count
            yield {
                "tokens": torch.from_numpy(tokens),
                "num_targets": torch.from_numpy(num_targets),
            }


class TokenData(L.LightningDataModule):
    """Training and validation batches from a folder that `stu-prepare` made.

    Args:
        dir: the folder.
        seq_len: tokens the model reads in one sample.
        micro_batch_size: samples each rank computes at once.
        seed: decides the order of samples.
        max_validation_tokens: targets of one validation, over all ranks; the first ones are used.

    Raises ValueError if the folder is damaged, or too short for one sample.
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
                raise ValueError(f"{name} {value}: must be at least 1")
        self.seq_len = seq_len
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.max_validation_tokens = max_validation_tokens
        self.train_shards = TokenShards(dir, "train")
        self.validation_shards = TokenShards(dir, "validation")
        self.accepted_changes: set[str] = set()
        """Parts of `identity` that may differ from a checkpoint's."""
        self._position = 0
        self.train_dataloader()  # a seq_len too long for the data is known now, not after a queue

    @property
    def position(self) -> int:
        """Samples consumed so far, over all ranks and epochs."""
        return self._position

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

        The training step calls this and not the loader, which may have fetched ahead.
        """
        self._position += num_samples

    def train_dataloader(self) -> SampleStream:
        """This rank's batches from `position` on, without end."""
        rank, world_size = self._rank_and_world_size()
        return SampleStream(
            self.train_shards,
            self.seq_len,
            self.micro_batch_size,
            self.seed,
            rank,
            world_size,
            self.position,
        )

    def val_dataloader(self) -> ValidationSet:
        """This rank's share of the first `max_validation_tokens` targets."""
        rank, world_size = self._rank_and_world_size()
        return ValidationSet(
            self.validation_shards,
            self.seq_len,
            self.micro_batch_size,
            self.max_validation_tokens,
            rank,
            world_size,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, **self.identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a run stopped; raises ValueError if it had another order of samples, unless
        that is accepted."""
        for name, value in self.identity().items():
            if state_dict.get(name, value) != value and name not in self.accepted_changes:
                raise ValueError(
                    f"data.{name} is {value!r}, but the checkpoint was made with "
                    f"{state_dict[name]!r}: its position would mean other samples; use that "
                    f"{name}, or start a new run"
                )
        self._position = state_dict["position"]

    def identity(self) -> dict[str, Any]:
        """Return what decides the meaning of a position, by name."""
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
        return self.trainer.global_rank, self.trainer.world_size
