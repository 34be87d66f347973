"""The interface of caches: what the layers of a model remember of the sequences being decoded.

There is a cache for each kind of memory in `stu.mixers`, which holds it for all layers that need it
and for all sequences. `serve.cache.budget.CACHES` lists them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from serve.cache.page_pool import PagePool
from serve.config import INVARIANT_ROWS, EngineConfig
from stu.model import FlashSTU


@dataclass(frozen=True)
class CacheSize:
    """Memory that a cache takes."""

    fixed_bytes: int = 0
    """Bytes allocated for all rows, independent of the number of pages."""
    page_bytes: int = 0
    """Bytes of one page; 0 for a cache without pages."""
    least_pages: int = 0
    """Pages without which no request can run."""
    usual_pages: int = 0
    """Pages of a request of the usual length."""
    most_pages: int = 0
    """Pages of the longest request."""


class Cache(ABC):
    """Memory of one kind, for all layers and every sequence.

    A sequence is known by a number, its owner. It is admitted, its prompt goes through each layer's
    `prefill`, it joins the batch as the last row, and then it steps: `begin_step`, each layer's
    `step`, `advance`. The arguments of `prefill` and `step` depend on the kind of memory.
    """

    pool: PagePool | None = None
    """Pool of the cache's pages, if it has any."""

    @classmethod
    @abstractmethod
    def size(cls, model: FlashSTU, config: EngineConfig) -> CacheSize | None:
        """Return the memory that this cache takes, or None if the model has no use for it."""

    @classmethod
    @abstractmethod
    def make(cls, model: FlashSTU, config: EngineConfig, num_pages: int) -> "Cache":
        """Allocate the cache with a pool of `num_pages`, the null page included."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of everything that the cache has allocated."""

    @property
    def num_free(self) -> int:
        """Pages that no sequence owns or has been promised."""
        return self.pool.num_free if self.pool else 0

    def owned(self, owner: int) -> int:
        """Return the number of pages that `owner` has or has been promised."""
        return len(self.pool.pages_of(owner)) if self.pool else 0

    def pages_needed(self, prompt_tokens: int, new_tokens: int) -> int:
        """Return the pages that a sequence of this length owns, or may come to own."""
        return 0

    @abstractmethod
    def admit(self, owner: int, prompt_tokens: int, new_tokens: int) -> None:
        """Reserve what `owner` needs for a prompt and new tokens, or raise OutOfPages."""

    @abstractmethod
    def release(self, owner: int) -> None:
        """Forget `owner`, which is no row of the batch, and free what it has."""

    @abstractmethod
    def join(self, owner: int) -> None:
        """Make `owner`, whose prompt has been prefilled, the last row of the batch."""

    @abstractmethod
    def leave(self, row: int) -> None:
        """Remove a row from the batch; the last row takes its place."""

    def begin_step(self, alone: bool) -> None:  # noqa: B027
        """Prepare for a token of every row. alone: compute each row by itself."""

    def advance(self) -> None:  # noqa: B027
        """Finish a step, after `step` for every layer."""


def num_rows(config: EngineConfig) -> int:
    """Return the rows of the batch, padded to whole groups where the batch is invariant."""
    at_once = INVARIANT_ROWS if config.batch_invariant else 1
    return -(-config.max_running // at_once) * at_once
