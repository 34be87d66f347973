"""Division of a batch into blocks of rows whose attention windows are gathered together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve.cache.page_pool import NULL_PAGE

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


def on_device(numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    """Return numbers on a device; the host does not wait until they are there."""
    tensor = torch.from_numpy(numbers)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
