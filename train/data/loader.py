"""Training and validation data of a run: sources, their weights, and the position."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning as L

from stu.common.errors import UserError
from stu.tokenizer import read_tokenizer
from train.data.batches import (
    Boundaries,
    PackedDocuments,
    Samples,
    SampleStream,
    ValidationSet,
    Windows,
)
from train.data.chats import chat_template, require_answers
from train.data.mixture import Source, check_conversations, fingerprint, open_sources
from train.data.order import SampleOrder
from train.data.rows.packing import context_of_tokens
from train.data.weights import Part, Phase, check_curriculum, check_weights, plan_phases, read_plan

BEFORE_DOCUMENTS = {"documents": "together", "packing": "cut"}
"""Values in `TokenData.identity` of checkpoints that lack them."""


class TokenData(L.LightningDataModule):
    """Training and validation batches from a folder that `stu-prepare` made.

    Args:
        dir: Folder of token shards, or of a mixture of sources.
        seq_len: Number of input tokens per sample.
        micro_batch_size: Number of samples that each rank processes at once.
        seed: Seed of the order of samples.
        max_validation_tokens: Maximum number of targets per validation, over all ranks, divided
            evenly among the sources; the first ones of a split are used.
        weights: Relative shares of the training tokens, by name of the source, as in `{code: 3,
            web: 1}`; a source that is not named is not used. null: the weights of the mixture.
        curriculum: Weights for the first parts of the run, each up to a step, as in `[{until_step:
            1000, weights: {web: 1}}]`; after them, `weights` apply.
        documents: `together`: tokens see all previous tokens of their sample. `apart`: they see
            only those of their own document.
        packing: `cut`: samples are consecutive pieces of the text, so documents are cut where
            samples end. `best_fit`: samples hold whole documents, if they fit, and little padding.

    Raises UserError if a value is not allowed, or the folder is damaged or has less than a sample.
    """

    def __init__(
        self,
        dir: str,
        seq_len: int,
        micro_batch_size: int,
        seed: int = 0,
        max_validation_tokens: int = 1_000_000,
        weights: dict[str, float] | None = None,
        curriculum: list[Part] | None = None,
        documents: Literal["together", "apart"] = "together",
        packing: Literal["cut", "best_fit"] = "cut",
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
        self.sources = open_sources(dir)
        self._has_answers = any(source.train.answers is not None for source in self.sources)
        self.is_mixture = self.sources[0].name != ""
        """Whether the sources have names, with which their epochs and validations are logged."""
        self._set_weights(weights, curriculum or [])
        self.accepted_changes: set[str] = set()
        """Names in `identity` whose values may differ from the checkpoint's."""
        self.ranks_per_sample = 1
        """Neighbouring ranks that read the same samples (`parallel.context`)."""
        self.position = 0
        """Samples consumed so far, over all ranks, sources and epochs."""
        self._resumed_position, self._resumed_step = 0, 0
        self._past: list[Phase] = []  # phases in the checkpoint that the run continues from
        self.documents, self.packing = documents, packing
        check_conversations(self.sources, seq_len, packing)
        self.chat_template = chat_template(self.sources)
        """Template that wrote the conversations of all sources; None without conversations."""
        self._boundaries = self._find_boundaries()
        self._samples = {source.name: self._divide(source) for source in self.sources}
        self._require_samples()
        require_answers(self.sources, self.validated, max_validation_tokens)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of all sources."""
        return sum(map(len, self._samples.values()))

    @cached_property
    def context_tokens(self) -> int:
        """Tokens of the sequences that a model sees: of whole samples, or, where documents are kept
        apart, of the document that an average token lies in, by the largest source."""
        if self.documents == "together":
            return self.seq_len
        source = max(self.sources, key=lambda source: len(source.train))
        return context_of_tokens(source.train.documents, self.seq_len)

    def num_samples(self, name: str) -> int:
        """Return the number of samples of a source."""
        return len(self._samples[name])

    @property
    def vocab_size(self) -> int:
        return self.sources[0].train.index.vocab_size

    @property
    def tokenizer_path(self) -> Path:
        return self.sources[0].train.tokenizer_path

    @property
    def tokenizer_sha256(self) -> str:
        return self.sources[0].train.index.tokenizer_sha256

    def advance(self, num_samples: int) -> None:
        """Count `num_samples`, over all ranks, as consumed.

        The training step calls this, as the loader may have fetched samples ahead.
        """
        self.position += num_samples

    def order(self, samples_per_step: int) -> SampleOrder:
        """Return the order of samples of a run whose steps consume `samples_per_step`."""
        sizes = {name: len(samples) for name, samples in self._samples.items()}
        return SampleOrder(sizes, self.seed, self._phases(samples_per_step))

    def epochs(self, position: int, samples_per_step: int) -> dict[str, float]:
        """Return how often each source of a mixture was read in the first `position` samples."""
        num_read = self.order(samples_per_step).num_read(position) if self.is_mixture else {}
        sizes = {name: len(samples) for name, samples in self._samples.items()}
        return {name: count / sizes[name] for name, count in num_read.items() if sizes[name]}

    @property
    def epochs_read(self) -> dict[str, float]:
        """How often each source of a mixture was read so far."""
        return self.epochs(self.position, self.samples_per_step)

    def train_dataloader(self) -> SampleStream:
        """Return the endless micro-batches of this rank from `position` on."""
        return SampleStream(
            list(self._samples.values()),
            self.order(self.samples_per_step),
            self.micro_batch_size,
            *self._rank_and_world_size(),
            self.position,
            self._micro_batches if self._has_answers else None,
        )

    def val_dataloader(self) -> list[ValidationSet]:
        """Return the micro-batches of this rank for the validation of each of `validated`."""
        return self.validation_sets(*self._rank_and_world_size())

    def validation_sets(self, rank: int, world_size: int) -> list[ValidationSet]:
        """Return the same for a rank of `world_size` that read different samples."""
        sources = [source for source in self.sources if source.name in self.validated]
        tokens = max(1, self.max_validation_tokens // len(sources))
        return [
            ValidationSet(
                source.validation,
                self.seq_len,
                self.micro_batch_size,
                tokens,
                rank,
                world_size,
                self._boundaries,
            )
            for source in sources
        ]

    def state_dict(self) -> dict[str, Any]:
        state = {"position": self.position, **self.identity()}
        if self.is_mixture:
            state["step"] = self.trainer.global_step if self.trainer else 0
            state["phases"] = [[*phase] for phase in self._phases(self.samples_per_step)]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of a checkpoint.

        Weights that differ from the checkpoint's hold from there on. Raises UserError if its run
        had another order of samples, unless that is accepted.
        """
        state_dict = BEFORE_DOCUMENTS | state_dict
        for name, value in self.identity().items():
            if state_dict.get(name, value) != value and name not in self.accepted_changes:
                raise UserError(
                    f"data.{name}",
                    message=f"data.{name} is {value!r}, but the checkpoint was made with "
                    f"{state_dict[name]!r}, so its position would mean other samples; use that "
                    f"{name}, or start a new run",
                )
        names = None if "contents" in self.accepted_changes else list(self._samples)
        self._past = read_plan(state_dict.get("phases", [[0, {"": 1.0}]]), names)
        self.position = self._resumed_position = state_dict["position"]
        self._resumed_step = state_dict.get("step", 0)

    def identity(self) -> dict[str, Any]:
        """Return all values on which the samples at a position depend, by name."""
        values = {
            "seed": self.seed,
            "seq_len": self.seq_len,
            "tokenizer_sha256": self.tokenizer_sha256,
            "num_tokens": sum(len(source.train) for source in self.sources),
            "contents": self._fingerprint,
            "documents": self.documents,
            "packing": self.packing,
        }
        mixture = {"weights": self.weights, "curriculum": self._curriculum}
        return values | mixture if self.is_mixture else values

    @property
    def samples_per_step(self) -> int:
        """Samples that an optimizer step consumes, over all ranks."""
        return self.micro_batch_size * self._rank_and_world_size()[1] * self._micro_batches

    @property
    def _micro_batches(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.sources)

    def _divide(self, source: Source) -> Samples:
        """Return the samples of a source; each kind of sample has its class."""
        if self.packing == "best_fit":
            return PackedDocuments(source.train, self.seq_len, self._boundaries)
        return Windows(source.train, self.seq_len, self._boundaries, self._has_answers)

    def _find_boundaries(self) -> Boundaries:
        if (self.documents, self.packing) == ("together", "cut"):
            return Boundaries()
        marks = read_tokenizer(self.tokenizer_path).start_ids
        for source in self.sources:
            for shards in (source.train, source.validation):
                _ = shards.documents  # raises if it is not known where they begin
        return Boundaries(self.documents == "apart", marks[0] if marks else None)

    def _set_weights(self, weights: dict[str, float] | None, curriculum: Sequence[Part]) -> None:
        if not self.is_mixture and (weights or curriculum):
            name = "weights" if weights else "curriculum"
            folder = self.sources[0].train.folder
            raise UserError(f"data.{name}", message=f"data.{name}: {folder} has no named sources")
        names = [source.name for source in self.sources]
        stored = {source.name: source.weight for source in self.sources}
        self.weights = check_weights("data.weights", stored if weights is None else weights, names)
        """Shares of the sources, which add up to 1; sources without a share are left out."""
        self._curriculum = check_curriculum(curriculum, names)
        held_out = {
            s.name: self.weights.get(s.name, 0) for s in self.sources if len(s.validation) > 1
        }
        if not held_out:
            folder = self.sources[0].train.folder
            raise UserError("data.dir", message=f"{folder}: no source has validation text")
        total = sum(held_out.values())
        self.validated = {
            name: weight / total if total else 1 / len(held_out)
            for name, weight in held_out.items()
        }
        """Shares in the means of a validation, by name of each source with validation text."""

    def _require_samples(self) -> None:
        parts = [self.weights, *(part["weights"] for part in self._curriculum)]
        for source in self.sources:
            is_read = any(source.name in part for part in parts)
            least = self.seq_len + 1 if self.packing == "cut" else 1
            if is_read and len(source.train) < least:
                raise UserError(
                    "data.seq_len",
                    self.seq_len,
                    f"less than {len(source.train)}, the number of training tokens{source.label}",
                    "lower it or prepare more text",
                )

    def _phases(self, samples_per_step: int) -> list[Phase]:
        past, position, step = self._past, self._resumed_position, self._resumed_step
        return plan_phases(past, position, step, samples_per_step, self._curriculum, self.weights)

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        count = self.ranks_per_sample
        return self.trainer.global_rank // count, self.trainer.world_size // count
