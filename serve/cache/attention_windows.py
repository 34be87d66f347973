"""Paged cache of sliding-window attention: keys and values that the next token can still see.

A page holds `page_len` consecutive positions of one sequence, counted from the first token of its
prompt. A sequence owns or shares the pages of its window, and gives up each when the last of its
positions leaves the window. On admission it is promised all pages that it may come to own,
`min(pages of all its positions, pages that a window can touch)`. Scores and sums are in float32 at
least.

A snapshot shares the full pages of a window, and has a copy of the last one if it is not full.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from serve.cache.base import Cache, CachePlan, DraftedToken, Snapshot
from serve.cache.page_pool import NULL_PAGE, OutOfPages, PagePool
from serve.cache.static_step import Numbers
from serve.cache.window_blocks import (
    BLOCK_BYTES,
    PagedWindow,
    SequenceWindow,
    WindowBlock,
    attend_block,
    draft_blocks,
    drafted_window,
    on_device,
    window_blocks,
)
from serve.cache.window_step import WindowStep
from serve.config import EngineConfig
from stu.attention import sliding_window_attention, window_scores
from stu.common.errors import UserError
from stu.decoding.memory import pages_for, window_pages, window_size
from stu.mixers import KeyWindow, remembered
from stu.model import FlashSTU


class AttentionCache(Cache):
    """The keys and values of every attention layer.

    Args:
        pool: Pages `[attention layers, 2, page_len, heads, head_dim]`, keys and values.
        most_drafts: Most tokens of a row that a step takes besides the first.
    """

    pool: PagePool

    def __init__(self, window: KeyWindow, pool: PagePool, most_drafts: int = 0) -> None:
        self._window, self.pool, self._most_drafts = window, pool, most_drafts
        self._page_len, self._device = pool.pages.shape[3], pool.pages.device
        self._scores = window_scores(window, self._device)
        self._windows: dict[int, SequenceWindow] = {}
        self._rows: list[int] = []
        self._promised = 0
        self._kept = np.zeros(len(pool.pages), dtype=np.int64)
        """Number of snapshots that share each page."""
        self._slots = torch.empty(0), torch.empty(0)
        # Keys and values of a block are gathered here: the system clears new memory, which takes
        # longer than the gathering.
        page = pool.pages[0, 0, 0]
        num_pages = max(
            window_pages(window.window_tokens, self._page_len), BLOCK_BYTES // page.nbytes
        )
        self._gathered = page.new_empty(2, num_pages, *page.shape)
        self._blocks: list[WindowBlock] = []
        self._num_drafted = Counter[int]()
        """Tokens of each row in a step of drafts."""

    @classmethod
    def plan(cls, model: FlashSTU, config: EngineConfig) -> CachePlan | None:
        windows = remembered(model.mixers, KeyWindow)
        if not windows:
            return None
        if len(set(windows)) > 1:
            raise UserError(
                message=f"layout={model.config.layout} cannot be decoded: the attention windows of "
                "its mixers differ; combine others"
            )
        longest = model.config.max_seq_len  # of any sequence
        windows = [replace(own, window_tokens=min(own.window_tokens, longest)) for own in windows]
        window, page_len = windows[0], config.page_len
        weight, drafts = model.embedding.weight, config.most_drafts
        place = weight.dtype, weight.device
        shape = len(windows), 2, page_len, window.num_heads, window.head_dim
        return CachePlan(
            window_size(windows, longest, page_len, weight.element_size(), drafts),
            lambda count: cls(window, PagePool(count + 1, shape, *place), drafts),
        )

    @property
    def num_bytes(self) -> int:
        return self.pool.pages.nbytes

    @property
    def num_used(self) -> int:
        alone = np.count_nonzero((self._kept > 0) & (self.pool.holders == self._kept))
        return self.pool.num_used - int(alone)

    @property
    def num_free(self) -> int:
        return self.pool.capacity - self._promised

    @property
    def num_kept(self) -> int:
        """Pages of snapshots. They must not be more than `num_free`."""
        return int(np.count_nonzero(self._kept))

    def owned(self, row: int) -> int:
        return self._windows[row].promised

    def check_integrity(self, rows: Collection[int]) -> None:
        self.pool.check_integrity()
        assert self._windows.keys() == set(rows), "a window belongs to a row that has ended"
        assert self.num_kept <= self.num_free, "snapshots have pages that are promised"
        held = {page for window in self._windows.values() for page in window.pages}
        held |= set(np.flatnonzero(self._kept).tolist())
        assert len(held) == self.pool.num_used, "a page belongs to none"

    def pages_needed(self, prompt_tokens: int, new_tokens: int) -> int:
        pages = pages_for(prompt_tokens + new_tokens, self._page_len)
        window, page_len = self._window.window_tokens, self._page_len
        return min(pages, window_pages(window, page_len, self._most_drafts))

    def admit(self, row: int, prompt_tokens: int, new_tokens: int) -> None:
        promised = self.pages_needed(prompt_tokens, new_tokens)
        if self._promised + promised > self.pool.capacity:
            raise OutOfPages(
                f"{promised} pages are needed and {self.pool.capacity - self._promised} of "
                f"{self.pool.capacity} not promised"
            )
        self._promised += promised
        self._windows[row] = SequenceWindow(promised=promised)

    def release(self, row: int) -> None:
        window = self._windows.pop(row)
        self._promised -= window.promised
        self.pool.free(row, window.pages)

    def snapshot(self, row: int, num_tokens: int) -> Snapshot:
        sequence = self._windows[row]
        assert sequence.length == num_tokens, f"row {row} has {sequence.length} tokens"
        first = max(0, num_tokens - self._window.window_tokens) // self._page_len
        full = num_tokens // self._page_len
        pages = sequence.pages[first - sequence.first_page :]
        shared, rest = pages[: full - first], pages[full - first :]
        self.pool.share(row, shared)
        self._kept[shared] += 1
        return Snapshot(num_tokens, tuple(self.pool.pages[p].clone() for p in rest), tuple(shared))

    def restore(self, row: int, snapshot: Snapshot) -> None:
        sequence = self._windows[row]
        self.pool.share(row, snapshot.pages)
        sequence.length, sequence.pages = snapshot.num_tokens, list(snapshot.pages)
        sequence.first_page = snapshot.num_tokens // self._page_len - len(snapshot.pages)
        self._allocate(row, len(snapshot.tensors))
        for page, kept in zip(sequence.pages[len(snapshot.pages) :], snapshot.tensors, strict=True):
            self.pool.pages[page] = kept

    def drop(self, snapshot: Snapshot) -> None:
        self._kept[list(snapshot.pages)] -= 1
        self.pool.free(NULL_PAGE, snapshot.pages)

    def begin_chunk(self, row: int, num_tokens: int) -> None:
        sequence, page_len = self._windows[row], self._page_len
        before, window = sequence.length, self._window.window_tokens
        first = max(0, before - window) - sequence.first_page * page_len
        sequence.earlier = slice(first, before - sequence.first_page * page_len)
        earlier_pages = sequence.pages
        sequence.length, sequence.chunk_tokens = before + num_tokens, num_tokens
        first_page = max(0, sequence.length - window) // page_len
        num_pages = (sequence.length - 1) // page_len + 1 - first_page
        # Pages that leave the window are used again for what follows: each layer reads its earlier
        # keys before it writes new ones.
        leaving = max(0, first_page - sequence.first_page)
        left, pages = sequence.pages[:leaving], sequence.pages[leaving:]
        used_again = [page for page in left if self.pool.holders[page] < 2]
        del used_again[num_pages - len(pages) :]
        self.pool.free(row, [page for page in left if page not in used_again])
        sequence.pages, sequence.first_page = [*pages, *used_again], first_page
        self._allocate(row, num_pages - len(sequence.pages))
        kept = np.arange(max(before, first_page * page_len), sequence.length)
        own_pages = np.array(sequence.pages)[kept // page_len - first_page]
        device = self._device
        sequence.earlier_pages = on_device(np.array(earlier_pages, dtype=np.int64), device)
        sequence.new_slots = on_device(own_pages, device), on_device(kept % page_len, device)

    def prefill(
        self, row: int, layer: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Return the attention output of the chunk that begins; all `[1, T, heads, head_dim]`."""
        sequence, pages = self._windows[row], self.pool.pages[:, layer]
        both = torch.stack([keys[0], values[0]])  # [2, T, heads, head_dim]
        earlier = pages.index_select(0, sequence.earlier_pages)
        earlier = earlier.transpose(0, 1).flatten(1, 2)[:, sequence.earlier]
        own_pages, places = sequence.new_slots
        for kind, new in enumerate(both[:, len(both[0]) - len(places) :]):
            pages[:, kind][own_pages, places] = new.to(pages.dtype)
        if end := sequence.length % self._page_len:
            pages[sequence.pages[-1], :, end:].zero_()  # what is masked must be finite as well
        seen = torch.cat([earlier, both], 1)[:, None]
        return sliding_window_attention(queries, seen[0], seen[1], self._scores)

    def begin_step(self, rows: list[int], alone: bool) -> None:
        windows = self._slide(rows)
        for sequence in windows:
            if sequence.length % self._page_len == 0:
                self.pool.pages[sequence.pages[-1]] = 0
        self._blocks = list(window_blocks(windows, *self._place(windows), alone, self._device))

    def begin_drafts(self, tokens: Sequence[DraftedToken], alone: bool) -> None:
        page_len, self._num_drafted = self._page_len, Counter(token.row for token in tokens)
        for row, sequence in zip(
            sorted(self._num_drafted), self._slide(sorted(self._num_drafted)), strict=True
        ):
            first, last = sequence.length, sequence.length + self._num_drafted[row] - 1
            self._allocate(row, last // page_len + 1 - sequence.first_page - len(sequence.pages))
            for page in sequence.pages[pages_for(first, page_len) - sequence.first_page :]:
                self.pool.pages[page] = 0
        shape = self._window.window_tokens, page_len
        windows = [drafted_window(self._windows[row], ahead, *shape) for row, ahead in tokens]
        self._blocks = list(draft_blocks(windows, *self._place(windows), self._device))

    def keep(self, row: int, num_tokens: int) -> None:
        sequence, page_len = self._windows[row], self._page_len
        sequence.length += num_tokens
        if num_tokens == self._num_drafted[row]:
            return
        count = (sequence.length - 1) // page_len + 1 - sequence.first_page
        self.pool.free(row, sequence.pages[count:])
        del sequence.pages[count:]
        if end := sequence.length % page_len:
            self.pool.pages[sequence.pages[-1], :, :, end:] = 0

    def _place(self, windows: Sequence[PagedWindow]) -> tuple[int, int]:
        """Let a step write to the ends of some windows. Return the positions of a page, and the
        bytes of its keys in a layer."""
        length, device = self._page_len, self._device
        pages = [own.pages[own.length // length - own.first_page] for own in windows]
        places = [own.length % length for own in windows]
        self._slots = torch.tensor(pages, device=device), torch.tensor(places, device=device)
        return length, self.pool.page_bytes // (2 * len(self.pool.pages[0]))

    def step(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, first: int = 0
    ) -> Tensor:
        """Return the outputs of one token of the rows from the `first` of the batch.

        All are `[B, 1, heads, head_dim]`. Those beyond the rows of the batch are padding, and their
        outputs are 0.
        """
        pages, places = (slots[first : first + len(queries)] for slots in self._slots)
        for kind, new in enumerate((keys, values)):
            new = new[: len(pages), 0].to(self.pool.pages.dtype)
            self.pool.pages[pages, layer, kind, places] = new
        outputs = torch.zeros_like(queries)
        for block in self._blocks:
            start, stop = block.rows.start - first, block.rows.stop - first
            if 0 <= start < len(queries):
                own, pages = queries[start:stop], self.pool.pages[:, layer]
                outputs[start:stop] = attend_block(pages, block, self._gathered, own, self._scores)
        return outputs

    def advance(self) -> None:
        for row in self._rows:
            self._windows[row].length += 1

    def static_step(self) -> WindowStep:
        return WindowStep(self.pool.pages, self._scores)

    def begin_static(self, rows: Sequence[int], shared: Numbers, own: Numbers) -> bool:
        own[:] = NULL_PAGE
        for numbers, sequence in zip(own, self._slide(rows), strict=True):
            numbers[0] = sequence.length - sequence.first_page * self._page_len
            numbers[1 : 1 + len(sequence.pages)] = sequence.pages
        return False

    def _slide(self, rows: Sequence[int]) -> list[SequenceWindow]:
        """Make the windows of all rows of the batch end at their next tokens, and return them."""
        self._rows = list(rows)
        for row in rows:
            sequence = self._windows[row]
            oldest = max(0, sequence.length - self._window.window_tokens) // self._page_len
            if oldest > sequence.first_page:
                self.pool.free(row, sequence.pages[: oldest - sequence.first_page])
                del sequence.pages[: oldest - sequence.first_page]
                sequence.first_page = oldest
            if sequence.length % self._page_len == 0:
                self._allocate(row, 1)
        return [self._windows[row] for row in rows]

    def _allocate(self, row: int, count: int) -> None:
        sequence = self._windows[row]
        # Not written to here: another sequence, which gave it back, may have to read it once more.
        sequence.pages.extend(self.pool.allocate(row, count))
        assert len(sequence.pages) <= sequence.promised, f"row {row} takes more than promised"
