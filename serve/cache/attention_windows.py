"""Paged cache of sliding-window attention: keys and values that the next token can still see.

A page holds `page_len` consecutive positions of one sequence, counted from the first token of its
prompt. A sequence owns the pages of its window, and frees each when the last of its positions
leaves the window. On admission it is promised all pages that it may come to own, `min(pages of all
its positions, pages that a window can touch)`. Scores and sums are in float32 at least.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from serve.cache.base import Cache, CacheSize
from serve.cache.page_pool import NULL_PAGE, OutOfPages, PagePool, pages_for
from serve.config import EngineConfig
from stu.attention import alibi_slopes, attend, sliding_window_attention
from stu.common.errors import UserError
from stu.mixers import KeyWindow, remembered
from stu.model import FlashSTU

BLOCK_BYTES = 2**22
"""Bytes of keys that are attended to at once on the CPU: they should fit the cache of a core."""


@dataclass
class _Window:
    """Window of one sequence."""

    promised: int
    """Number of pages that it may come to own."""
    length: int = 0
    """Number of positions that went through all layers."""
    first_page: int = 0
    """Index, among all pages of the sequence, of the first that it still owns."""
    pages: list[int] = field(default_factory=list)


class AttentionCache(Cache):
    """The keys and values of every attention layer.

    Args:
        pool: Pages `[attention layers, 2, page_len, heads, head_dim]`, keys and values.
    """

    pool: PagePool

    def __init__(self, window: KeyWindow, pool: PagePool) -> None:
        self._window, self.pool = window, pool
        self._page_len = pool.pages.shape[3]
        self._slopes = alibi_slopes(window.num_heads).to(pool.pages.device)
        self._windows: dict[int, _Window] = {}
        self._rows: list[int] = []
        self._promised = 0
        self._slots = torch.empty(0), torch.empty(0)
        # Keys and values of a block are gathered here: the system clears new memory, which takes
        # longer than the gathering.
        page = pool.pages[0, 0, 0]
        num_pages = max(window_pages(window, self._page_len), BLOCK_BYTES // page.nbytes)
        self._gathered = page.new_empty(2, num_pages, *page.shape)
        self._blocks: list[tuple[slice, Tensor, Tensor]] = []

    @classmethod
    def size(cls, model: FlashSTU, config: EngineConfig) -> CacheSize | None:
        windows = remembered(model.mixers, KeyWindow)
        if not windows:
            return None
        if len(set(windows)) > 1:
            raise UserError(
                message=f"layout={model.config.layout} cannot be decoded: the attention windows of "
                "its mixers differ; combine others"
            )
        window, page_len = windows[0], config.page_len
        numbers = len(windows) * 2 * page_len * window.num_heads * window.head_dim
        pages = pages_for(model.config.max_seq_len, page_len)
        pages = min(pages, window_pages(window, page_len))
        page_bytes = numbers * model.embedding.weight.element_size()
        return CacheSize(0, page_bytes, pages, pages, pages)

    @classmethod
    def make(cls, model: FlashSTU, config: EngineConfig, num_pages: int) -> "AttentionCache":
        windows, weight = remembered(model.mixers, KeyWindow), model.embedding.weight
        shape = len(windows), 2, config.page_len, windows[0].num_heads, windows[0].head_dim
        return cls(windows[0], PagePool(num_pages, shape, weight.dtype, weight.device))

    @property
    def num_bytes(self) -> int:
        return self.pool.pages.nbytes

    @property
    def num_free(self) -> int:
        return self.pool.capacity - self._promised

    def owned(self, owner: int) -> int:
        return self._windows[owner].promised

    def pages_needed(self, prompt_tokens: int, new_tokens: int) -> int:
        pages = pages_for(prompt_tokens + new_tokens, self._page_len)
        return min(pages, window_pages(self._window, self._page_len))

    def admit(self, owner: int, prompt_tokens: int, new_tokens: int) -> None:
        promised = self.pages_needed(prompt_tokens, new_tokens)
        if self._promised + promised > self.pool.capacity:
            raise OutOfPages(
                f"{promised} pages are needed and {self.pool.capacity - self._promised} of "
                f"{self.pool.capacity} not promised"
            )
        self._promised += promised
        self._windows[owner] = _Window(promised)

    def release(self, owner: int) -> None:
        assert owner not in self._rows, f"sequence {owner} is still in the batch"
        self._promised -= self._windows.pop(owner).promised
        self.pool.free(owner, self.pool.pages_of(owner))

    def prefill(
        self, owner: int, layer: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Return the attention output of a whole prompt; all `[1, P, heads, head_dim]`."""
        window, softcap = self._window.window_tokens, self._window.softcap
        sequence, length = self._windows[owner], keys.shape[1]
        if not sequence.pages:
            sequence.length = length
            sequence.first_page = max(0, length - window) // self._page_len
            last_page = (length - 1) // self._page_len
            self._allocate(owner, last_page - sequence.first_page + 1)
        for index, page in enumerate(sequence.pages):
            start = (sequence.first_page + index) * self._page_len
            new = slice(start, min(start + self._page_len, length))
            self.pool.pages[page, layer, 0, : new.stop - start] = keys[0, new]
            self.pool.pages[page, layer, 1, : new.stop - start] = values[0, new]
        return sliding_window_attention(queries, keys, values, self._slopes, window, softcap)

    def join(self, owner: int) -> None:
        self._rows.append(owner)

    def leave(self, row: int) -> None:
        self._rows[row] = self._rows[-1]
        self._rows.pop()

    def begin_step(self, alone: bool) -> None:
        pages, places = [], []
        for owner in self._rows:
            sequence = self._windows[owner]
            page, place = divmod(sequence.length, self._page_len)
            oldest = max(0, sequence.length - self._window.window_tokens) // self._page_len
            if oldest > sequence.first_page:
                self.pool.free(owner, sequence.pages[: oldest - sequence.first_page])
                del sequence.pages[: oldest - sequence.first_page]
                sequence.first_page = oldest
            if place == 0:
                self._allocate(owner, 1)
            pages.append(sequence.pages[page - sequence.first_page])
            places.append(place)
        device = self.pool.pages.device
        self._slots = torch.tensor(pages, device=device), torch.tensor(places, device=device)
        self._blocks = list(self._row_blocks(alone))

    def step(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, first_row: int = 0
    ) -> Tensor:
        """Return the outputs of one token of the rows from `first_row`: all `[B, 1, heads,
        head_dim]`. Rows beyond those of the batch are padding, whose outputs are 0.
        """
        window = self._window
        pages, places = (slots[first_row : first_row + len(queries)] for slots in self._slots)
        for kind, new in enumerate((keys, values)):
            new = new[: len(pages), 0].to(self.pool.pages.dtype)
            self.pool.pages[pages, layer, kind, places] = new
        dtype = torch.promote_types(queries.dtype, torch.float32)
        outputs = torch.zeros_like(queries)
        for rows, tables, distances in self._blocks:
            if not first_row <= rows.start < first_row + len(queries):
                continue
            here = slice(rows.start - first_row, rows.stop - first_row)
            keys_seen, values_seen = (
                torch.index_select(
                    self.pool.pages[:, layer, kind],
                    0,
                    tables,
                    out=self._gathered[kind, : len(tables)],
                )
                .view(rows.stop - rows.start, -1, *keys.shape[2:])
                .to(dtype)
                .transpose(1, 2)  # [B, heads, S, head_dim]
                for kind in (0, 1)
            )
            asked = queries[here].to(dtype).transpose(1, 2)  # [B, heads, 1, head_dim]
            attended = attend(
                asked,
                keys_seen,
                values_seen,
                distances,
                self._slopes,
                window.window_tokens,
                window.softcap,
            )
            outputs[here] = attended.transpose(1, 2).to(queries.dtype)
        return outputs

    def advance(self) -> None:
        for owner in self._rows:
            self._windows[owner].length += 1

    def _allocate(self, owner: int, count: int) -> None:
        sequence = self._windows[owner]
        pages = self.pool.allocate(owner, count)
        self.pool.pages[pages] = 0  # what is masked must be finite all the same
        sequence.pages.extend(pages)
        assert len(sequence.pages) <= sequence.promised, (
            f"sequence {owner} takes more than promised"
        )

    def _row_blocks(self, alone: bool) -> list[tuple[slice, Tensor, Tensor]]:
        """Return blocks of rows to attend to at once: the rows, their page tables padded with the
        null page `[B n]`, and the distance back to each slot `[B, 1, 1, n page_len]`, negative for
        later positions."""
        device, page_len = self.pool.pages.device, self._page_len
        page_bytes = self.pool.page_bytes // (2 * len(self.pool.pages[0]))
        blocks, start = [], 0
        while start < len(self._rows):
            stop, longest = start, 0
            while stop < len(self._rows):
                longest_with = max(longest, len(self._windows[self._rows[stop]].pages))
                num_bytes = (stop + 1 - start) * longest_with * page_bytes
                if stop > start and (alone or num_bytes > BLOCK_BYTES):
                    break
                stop, longest = stop + 1, longest_with
            windows = [self._windows[owner] for owner in self._rows[start:stop]]
            tables = [own.pages + [NULL_PAGE] * (longest - len(own.pages)) for own in windows]
            newest = [own.length - own.first_page * page_len for own in windows]
            distances = torch.tensor(newest, device=device)[:, None] - torch.arange(
                longest * page_len, device=device
            )
            blocks.append(
                (
                    slice(start, stop),
                    torch.tensor(tables, device=device).flatten(),
                    distances[:, None, None],
                )
            )
            start = stop
        return blocks


def window_pages(window: KeyWindow, page_len: int) -> int:
    """Return the number of pages that a token and its window can touch."""
    return pages_for(window.window_tokens, page_len) + 1
