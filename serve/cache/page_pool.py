"""A fixed pool of cache pages: each is free, or owned by one sequence.

A page holds `page_len` consecutive positions of one sequence, all layers of one kind together. Page
0 is the null page: a place for padding to be read from and written to, never owned.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NULL_PAGE = 0
FREE = -1
NULL_OWNER = -2


class OutOfPages(Exception):
    """There are fewer free pages than a sequence needs at the moment."""


class Pages(NamedTuple):
    """Pages of both kinds."""

    convolution: int
    attention: int


class PagePool:
    """Pages of one kind, allocated once: `pages [num_pages, *page_shape]`, the null page included.

    Owners are sequence numbers >= 0. The same calls in the same order give the same pages.
    """

    def __init__(
        self,
        num_pages: int,
        page_shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        if num_pages < 2:
            raise ValueError(
                f"num_pages={num_pages} is not allowed: the null page and at least one more are "
                "needed; give the cache more bytes, or make pages smaller"
            )
        self.pages: Tensor = torch.zeros(num_pages, *page_shape, dtype=dtype, device=device)
        self._owners = np.full(num_pages, FREE, dtype=np.int64)
        self._owners[NULL_PAGE] = NULL_OWNER
        # A stack: pages used last are the ones still in the processor's cache.
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))

    @property
    def capacity(self) -> int:
        """Pages that sequences can own."""
        return len(self._owners) - 1

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that a sequence owns."""
        return self.capacity - self.num_free

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.pages[NULL_PAGE].numel() * self.pages.element_size()

    def allocate(self, owner: int, count: int) -> list[int]:
        """Give `count` pages to `owner`, or none and raise OutOfPages. Their contents are old."""
        assert owner >= 0, f"owner {owner} is not a sequence number"
        assert count >= 0, f"{count} pages cannot be allocated"
        if count > self.num_free:
            raise OutOfPages(
                f"{count} pages are needed and {self.num_free} of {self.capacity} free"
            )
        taken = self._free[len(self._free) - count :][::-1]
        del self._free[len(self._free) - count :]
        self._owners[taken] = owner
        return taken

    def free(self, owner: int, pages: Sequence[int]) -> None:
        """Take `pages` back from `owner`; each must be its own, and be named once."""
        for page in pages:
            assert self._owners[page] == owner, (
                f"page {page} belongs to {self._owners[page]}, not to {owner}"
            )
            self._owners[page] = FREE
            self._free.append(page)

    def pages_of(self, owner: int) -> list[int]:
        """The pages of `owner`, in ascending order."""
        pages: list[int] = np.flatnonzero(self._owners == owner).tolist()
        return pages

    def check_integrity(self) -> None:
        """Raises AssertionError unless every page but the null page is free or owned, once."""
        assert self._owners[NULL_PAGE] == NULL_OWNER, "the null page has an owner"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        free = sorted(self._free)
        assert free == np.flatnonzero(self._owners == FREE).tolist(), "a page is lost"
        assert (self._owners[1:] >= FREE).all(), "a page has an impossible owner"


def pages_for(positions: int, page_len: int) -> int:
    """Pages that hold so many positions."""
    return -(-positions // page_len)
