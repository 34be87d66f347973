"""Division of a batch into blocks of rows whose attention windows are gathered together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve.cache.page_pool import NULL_PAGE
from stu.attention import Scores, attend

BLOCK_BYTES = 2**22
"""Bytes of keys that are attended to at once on the CPU: they should fit the cache of a core."""


@dataclass
class PagedWindow:
    """The pages that hold the window of a sequence."""

    length: int = 0
    """Number of positions that went through all layers, or are going through them."""
    first_page: int = 0
    """Index, among all pages of the sequence, of the first that it still has."""
    pages: list[int] = field(default_factory=list)


@dataclass
class SequenceWindow(PagedWindow):
    """Window of one sequence."""

    promised: int = 0
    """Number of pages that it may come to own."""
    chunk_tokens: int = 0
    """Positions at the end that are going through the layers as a chunk of a prompt."""
    earlier: slice = field(default_factory=lambda: slice(0))
    """Positions in the window of the chunk, among those of `earlier_pages`."""
    earlier_pages: Tensor = field(default_factory=lambda: torch.empty(0))
    """Pages that hold the window before the chunk."""
    new_slots: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.empty(0),) * 2)
    """Pages, and places in them, of the positions of the chunk that stay in the window."""


class WindowBlock(NamedTuple):
    """Rows to attend to at once."""

    rows: slice
    tables: Tensor
    """Their page tables, padded with the null page, `[B n]`."""
    distances: Tensor
    """Distance back to each slot, negative for later positions, `[B, 1, 1, n page_len]`."""
    end: int | None = None
    """Slot from which on the page table has drafts after the only row's token; None: none."""


def window_blocks(
    windows: Sequence[PagedWindow],
    page_len: int,
    page_bytes: int,
    alone: bool,
    device: torch.device,
) -> Iterator[WindowBlock]:
    """Divide the windows of a batch into blocks.

    Args:
        windows: Windows of the rows, in their order.
        page_len: Positions of a page.
        page_bytes: Bytes of a page's keys in a layer.
        alone: Put each row into a block of its own.
        device: Device of the tensors.
    """
    start = 0
    while start < len(windows):
        stop, longest = start, 0
        while stop < len(windows):
            longest_with = max(longest, len(windows[stop].pages))
            num_bytes = (stop + 1 - start) * longest_with * page_bytes
            if stop > start and (alone or num_bytes > BLOCK_BYTES):
                break
            stop, longest = stop + 1, longest_with
        block = windows[start:stop]
        tables = [own.pages + [NULL_PAGE] * (longest - len(own.pages)) for own in block]
        newest = [own.length - own.first_page * page_len for own in block]
        distances = torch.tensor(newest, device=device)[:, None] - torch.arange(
            longest * page_len, device=device
        )
        yield WindowBlock(
            slice(start, stop),
            torch.tensor(tables, device=device).flatten(),
            distances[:, None, None],
        )
        start = stop


def draft_blocks(
    windows: Sequence[PagedWindow], page_len: int, page_bytes: int, device: torch.device
) -> Iterator[WindowBlock]:
    """Yield a block for each window of a token of a step of drafts."""
    blocks = window_blocks(windows, page_len, page_bytes, True, device)
    for window, block in zip(windows, blocks, strict=True):
        yield block._replace(end=window.length - window.first_page * page_len + 1)


def drafted_window(
    sequence: PagedWindow, ahead: int, window_tokens: int, page_len: int
) -> PagedWindow:
    """Return the window of a sequence when it has `ahead` more tokens, for which it has pages."""
    length = sequence.length + ahead
    oldest = max(0, length - window_tokens) // page_len
    first, stop = oldest - sequence.first_page, length // page_len + 1 - sequence.first_page
    return PagedWindow(length, oldest, sequence.pages[first:stop])


def attend_block(
    pages: Tensor, block: WindowBlock, gathered: Tensor, queries: Tensor, scores: Scores
) -> Tensor:
    """Return the outputs of the tokens of a block, `[B, 1, heads, head_dim]` as their queries.

    pages: Pages of a layer, `[pages, 2, page_len, heads, head_dim]`. gathered: Memory for those of
    a block, `[2, >= B n, page_len, heads, head_dim]`.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    both = []
    for kind in (0, 1):
        out = gathered[kind, : len(block.tables)]
        seen = torch.index_select(pages[:, kind], 0, block.tables, out=out)
        if block.end is not None:
            seen.flatten(0, 1)[block.end :] = 0  # what is masked must be finite as well
        seen = seen.view(len(queries), -1, *queries.shape[2:])
        both.append(seen.to(dtype).transpose(1, 2))  # [B, heads, S, head_dim]
    asked = queries.to(dtype).transpose(1, 2)  # [B, heads, 1, head_dim]
    attended = attend(asked, both[0], both[1], block.distances, scores)
    return attended.transpose(1, 2).to(queries.dtype)


def on_device(numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    """Return numbers on a device; the host does not wait until they are there."""
    tensor = torch.from_numpy(numbers)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
