"""A fixed pool of cache pages, each free, owned by one sequence, or shared.

A page holds `page_len` consecutive positions of one sequence, for all layers of one kind. Pages
that are shared are counted by their holders, and not written to. Page 0 is the null page, which
padding is read from and written to; it is never owned.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stu.common.errors import UserError, setting_name

NULL_PAGE = 0
FREE = -1
NULL_OWNER = -2
SHARED = -3


class OutOfPages(Exception):
    """Fewer pages are free at the moment than a sequence needs."""


class Pages(NamedTuple):
    """Numbers of pages of both kinds."""

    convolution: int
    attention: int


class PagePool:
    """Pages of one kind, allocated once.

    Owners are sequence numbers >= 0. The same calls in the same order give the same pages.

    Args:
        num_pages: Number of pages, including the null page.
        page_shape: Shape of a page.
        dtype: Type of the numbers.
        device: Device of the pages.
    """

    def __init__(
        self,
        num_pages: int,
        page_shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        if num_pages < 2:
            raise UserError(
                "cache_gib",
                message=f"{num_pages} pages do not suffice: the null page and at least one more "
                f"are needed; raise {setting_name('cache_gib')}, or lower "
                f"{setting_name('page_len')}",
            )
        self.pages: Tensor = torch.zeros(num_pages, *page_shape, dtype=dtype, device=device)
        """`[num_pages, *page_shape]`."""
        self._owners = np.full(num_pages, FREE, dtype=np.int64)
        self._owners[NULL_PAGE] = NULL_OWNER
        self.holders = np.zeros(num_pages, dtype=np.int64)
        """Number of those that share each page; none may write to one with several. 0: not shared.
        """
        # A stack: pages used last are the ones still in the processor's cache.
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))

    @property
    def capacity(self) -> int:
        """Number of pages that sequences can own."""
        return len(self._owners) - 1

    @property
    def num_free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Number of pages that are not free."""
        return self.capacity - self.num_free

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.pages[NULL_PAGE].numel() * self.pages.element_size()

    def allocate(self, owner: int, count: int) -> list[int]:
        """Allocate `count` pages, whose contents are undefined, or raise OutOfPages."""
        assert owner >= 0, f"owner {owner} is not a sequence number"
        assert count >= 0, f"{count} pages cannot be allocated"
        if count > self.num_free:
            raise OutOfPages(
                f"{count} pages are needed and {self.num_free} of {self.capacity} free"
            )
        pages = self._free[len(self._free) - count :][::-1]
        del self._free[len(self._free) - count :]
        self._owners[pages] = owner
        return pages

    def share(self, owner: int, pages: Sequence[int]) -> None:
        """Add a holder to each of `pages`. What `owner` owns alone becomes shared, and `owner` its
        first holder."""
        for page in pages:
            if self._owners[page] == owner:
                self._owners[page], self.holders[page] = SHARED, 1
            assert self._owners[page] == SHARED, f"page {page} is not to be shared by {owner}"
            self.holders[page] += 1

    def free(self, owner: int, pages: Sequence[int]) -> None:
        """Free `pages` of `owner`, each named once, or end its hold of those that are shared."""
        for page in pages:
            if self._owners[page] == SHARED:
                self.holders[page] -= 1
                if self.holders[page]:
                    continue
            else:
                assert self._owners[page] == owner, (
                    f"page {page} belongs to {self._owners[page]}, not to {owner}"
                )
            self._owners[page] = FREE
            self._free.append(page)

    def pages_of(self, owner: int) -> list[int]:
        """Return the pages of `owner` in ascending order, without those it shares."""
        pages: list[int] = np.flatnonzero(self._owners == owner).tolist()
        return pages

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page but the null page is free, owned or shared."""
        assert self._owners[NULL_PAGE] == NULL_OWNER, "the null page has an owner"
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        free = sorted(self._free)
        assert free == np.flatnonzero(self._owners == FREE).tolist(), "a page is lost"
        shared = self._owners == SHARED
        assert ((self._owners >= FREE) | shared)[1:].all(), "a page has an impossible owner"
        assert ((self.holders > 0) == shared).all(), "the holders of a page are miscounted"
