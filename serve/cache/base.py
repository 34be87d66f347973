"""The interface of caches: what the layers of a model remember of the sequences being decoded.

There is a cache for each kind of memory in `stu.mixers`, which holds it for all layers that need it
and for all sequences. `serve.cache.budget.CACHES` lists them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from serve.cache.page_pool import PagePool
from serve.cache.static_step import Numbers, StaticStep
from serve.config import INVARIANT_ROWS, EngineConfig
from stu.common.errors import UserError
from stu.decoding.memory import CacheSize
from stu.model import FlashSTU


@dataclass(frozen=True)
class ConvolutionCacheInfo:
    """The cache of long convolutions, as logs and metrics show it."""

    kind: Literal["state", "pages"]
    page_bytes: int
    """Bytes of a sequence with states, and of `page_len` new tokens in pages."""
    rank: int = 0
    """Numbers in the state of a channel; 0 in pages."""
    error: float = 0.0
    """Largest error of a tap, relative to the largest tap of its filter."""
    reason: str = ""
    """Why there are no states."""

    def __str__(self) -> str:
        if self.kind == "pages":
            return f"FutureFill in pages of {self.page_bytes:,} bytes, as {self.reason}"
        return (
            f"spectral states of rank {self.rank}, {self.page_bytes:,} bytes a sequence; taps "
            f"differ by {self.error:.1e} of a filter's largest"
        )


@dataclass(frozen=True)
class CachePlan:
    """A cache that can hold what a model remembers."""

    size: CacheSize
    make: Callable[[int], "Cache"]
    """Allocates the cache with that many pages, besides a null page if it needs one."""
    info: ConvolutionCacheInfo | None = None
    """The cache of long convolutions, as logs and metrics show it; None for other caches."""


@dataclass(frozen=True)
class Snapshot:
    """State of a sequence in one cache, after `num_tokens` tokens."""

    num_tokens: int
    tensors: tuple[Tensor, ...] = ()
    """Copies, which belong to the snapshot alone."""
    pages: tuple[int, ...] = ()
    """Full pages of the cache's pool, shared with sequences and other snapshots."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the copies."""
        return sum(tensor.nbytes for tensor in self.tensors)


class DraftedToken(NamedTuple):
    """A token of a step that takes several of a row."""

    row: int
    ahead: int
    """Tokens of the row before it in the step."""


class CannotHold(Exception):
    """A cache is not made for what this model remembers."""


class Cache(ABC):
    """Memory of one kind, for all layers and every sequence.

    A sequence is known by its row of the batch, which it keeps from `admit` to `release`. Its
    prompt goes through each layer's `prefill`, in one or more chunks, each announced by
    `begin_chunk`. It joins the batch, and then it steps: `begin_step`, each layer's `step`,
    `advance`. The arguments of `prefill` and `step` depend on the kind of memory. A step may take
    several tokens of a row, of which the first are kept: `begin_drafts`, each layer's `step` for
    all tokens in this order, `keep` for each row, `advance_drafts`.
    """

    takes_chunks: ClassVar[bool] = True
    """Whether prompts may come in several chunks, and sequences continue from snapshots."""
    pool: PagePool | None = None
    """Pool of the cache's pages, if it has any. Rows own them."""

    @classmethod
    @abstractmethod
    def plan(cls, model: FlashSTU, config: EngineConfig) -> CachePlan | None:
        """Return how to make this cache, or None if the model has no use for it. Raises CannotHold
        if another cache of this kind of memory has to be used."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of everything that the cache has allocated."""

    @property
    def capacity(self) -> int:
        """Pages that there are."""
        return self.pool.capacity if self.pool else 0

    @property
    def num_used(self) -> int:
        """Pages that rows own."""
        return self.pool.num_used if self.pool else 0

    @property
    def num_free(self) -> int:
        """Pages that no row owns or has been promised."""
        return self.pool.num_free if self.pool else 0

    def owned(self, row: int) -> int:
        """Return the number of pages that a row has or has been promised."""
        return len(self.pool.pages_of(row)) if self.pool else 0

    def pages_needed(self, prompt_tokens: int, new_tokens: int) -> int:
        """Return the pages that a sequence of this length owns, or may come to own."""
        return 0

    def check_integrity(self, rows: Collection[int]) -> None:
        """Raise AssertionError if a page is lost, has two owners or belongs to none of `rows`."""
        if self.pool:
            self.pool.check_integrity()
            held = sum(len(self.pool.pages_of(row)) for row in rows)
            assert held == self.pool.num_used, "a page belongs to a row that has ended"

    @abstractmethod
    def admit(self, row: int, prompt_tokens: int, new_tokens: int) -> None:
        """Reserve what `row` needs for a prompt and new tokens, or raise OutOfPages."""

    def release(self, row: int) -> None:  # noqa: B027
        """Forget `row`, which has left the batch or never joined it, and free what it has."""

    def begin_chunk(self, row: int, num_tokens: int) -> None:  # noqa: B027
        """Prepare for the next tokens of the prompt of `row`."""

    def steps_until_aligned(self, num_tokens: int) -> int:
        """Return the number of steps after which a sequence of so many tokens can join where it
        always joins, so that its sums do not depend on when it does."""
        return 0

    def skip(self, num_steps: int) -> None:  # noqa: B027
        """Let steps pass, while there is no row in the batch."""

    def join(self, row: int, ahead: int = 0) -> None:  # noqa: B027
        """Add `row`, whose prompt has been prefilled, to the batch. ahead: steps by which it is to
        be ahead of the other rows, as though they had gone by."""

    def leave(self, row: int) -> None:  # noqa: B027
        """Remove `row` from the batch."""

    def snapshot(self, row: int, num_tokens: int) -> Snapshot:
        """Return what there is of `row`, `num_tokens` tokens of which have gone through all layers,
        in or before the batch. Not for caches that take no chunks."""
        raise NotImplementedError

    def restore(self, row: int, snapshot: Snapshot) -> None:
        """Continue `row`, which has just been admitted, from a snapshot of another sequence."""
        raise NotImplementedError

    def drop(self, snapshot: Snapshot) -> None:  # noqa: B027
        """Give back the pages of a snapshot, which is not used again."""

    @abstractmethod
    def begin_step(self, rows: list[int], alone: bool) -> None:
        """Prepare for a token of `rows`, all of the batch, in ascending order. alone: compute each
        row by itself."""

    def advance(self) -> None:  # noqa: B027
        """Finish a step, after `step` for every layer."""

    def most_tokens(self, row: int) -> int | None:
        """Return the most tokens of `row` that a step may take; None: any number."""
        return None

    @abstractmethod
    def begin_drafts(self, tokens: Sequence[DraftedToken], alone: bool) -> None:
        """Prepare for a step of these tokens of the batch, in place of `begin_step`. Each row has
        at least one, and its tokens are in their order. alone: as for `begin_step`."""

    @abstractmethod
    def keep(self, row: int, num_tokens: int) -> None:
        """Finish a step of drafts for `row`, which remembers its first `num_tokens`, at least one,
        and forgets the others."""

    def advance_drafts(self) -> None:  # noqa: B027
        """Finish a step of drafts, after `keep` for every row that has not left the batch."""

    def static_step(self) -> StaticStep | None:
        """Return the device's part of steps that can be captured, or None if there is none."""
        return None

    def begin_static(self, rows: Sequence[int], shared: Numbers, own: Numbers) -> bool:
        """Prepare for a token of `rows` by `static_step`, in place of `begin_step`, and return
        whether a layer's page ends with it.

        Args:
            rows: All rows of the batch, in ascending order.
            shared: Numbers that all rows share, to be filled in.
            own: Numbers of each of `rows`, to be filled in.
        """
        return False

    def advance_static(self) -> None:
        """Finish a step of `static_step`, in place of `advance`."""
        self.advance()


def num_rows(config: EngineConfig) -> int:
    """Return the rows of the batch, padded to whole groups where the batch is invariant."""
    at_once = INVARIANT_ROWS if config.batch_invariant else 1
    return -(-config.max_running // at_once) * at_once


def require_finite(*filters: Tensor) -> None:
    """Raise UserError for filters of a damaged model."""
    if not all(tensor.isfinite().all() for tensor in filters):
        raise UserError(
            message="the model's convolution filters are not finite: its weights are damaged; try "
            "another checkpoint"
        )
