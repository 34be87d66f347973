"""The page pool against a plain set of pages."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.cache.page_pool import NULL_PAGE, OutOfPages, PagePool
from stu.common.errors import UserError
from stu.decoding.memory import pages_for

NUM_PAGES = 12


class PoolMachine(RuleBasedStateMachine):
    """Random allocation by several owners; the model is who owns what."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(NUM_PAGES, (2, 3))
        self.owned = {owner: set() for owner in range(4)}

    @rule(owner=st.integers(0, 3), count=st.integers(0, 6))
    def allocate(self, owner, count):
        used = set().union(*self.owned.values())
        if count > NUM_PAGES - 1 - len(used):
            with pytest.raises(OutOfPages, match=f"{count} pages are needed"):
                self.pool.allocate(owner, count)
            return
        pages = self.pool.allocate(owner, count)
        assert len(set(pages)) == count
        assert not used & set(pages)
        assert NULL_PAGE not in pages
        self.owned[owner] |= set(pages)

    @precondition(lambda self: any(self.owned.values()))
    @rule(data=st.data())
    def free_some(self, data):
        owner = data.draw(st.sampled_from([o for o, pages in self.owned.items() if pages]))
        pages = data.draw(st.lists(st.sampled_from(sorted(self.owned[owner])), unique=True))
        self.pool.free(owner, pages)
        self.owned[owner] -= set(pages)

    @precondition(lambda self: any(self.owned.values()))
    @rule(data=st.data())
    def free_what_another_owns(self, data):
        owner = data.draw(st.sampled_from([o for o, pages in self.owned.items() if pages]))
        page = data.draw(st.sampled_from(sorted(self.owned[owner])))
        with pytest.raises(AssertionError, match=f"page {page} belongs to {owner}"):
            self.pool.free(owner + 1, [page])

    @invariant()
    def agrees_with_the_model(self):
        self.pool.check_integrity()
        for owner, pages in self.owned.items():
            assert self.pool.pages_of(owner) == sorted(pages)
        assert self.pool.num_used == sum(map(len, self.owned.values()))
        assert self.pool.num_free + self.pool.num_used == self.pool.capacity == NUM_PAGES - 1


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_pages_are_allocated_once():
    pool = PagePool(5, (3, 4, 8), torch.float32)
    assert pool.pages.shape == (5, 3, 4, 8)
    assert pool.page_bytes == 3 * 4 * 8 * 4
    address = pool.pages.data_ptr()
    pool.free(7, pool.allocate(7, 4))
    assert pool.pages.data_ptr() == address


def test_the_same_calls_give_the_same_pages():
    def run():
        pool = PagePool(9, (1,))
        first = pool.allocate(0, 3)
        pool.free(0, first[1:])
        return first + pool.allocate(1, 5)

    assert run() == run()


def test_a_page_freed_twice_or_lost_is_found():
    pool = PagePool(6, (1,))
    pages = pool.allocate(0, 2)
    with pytest.raises(AssertionError, match="belongs to -1"):
        pool.free(0, [pages[0], pages[0]])
    pool._owners[pages[1]] = -1  # as if someone had forgotten it
    with pytest.raises(AssertionError, match="a page is lost"):
        pool.check_integrity()


def test_too_small_a_pool():
    with pytest.raises(UserError, match="1 pages do not suffice"):
        PagePool(1, (1,))


@pytest.mark.parametrize(("positions", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_pages_for(positions, pages):
    assert pages_for(positions, 16) == pages
