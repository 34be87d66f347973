"""Static step of attention windows: keys and values by page tables of a fixed width."""

import torch
from torch import Tensor

from serve.cache.static_step import StaticStep
from serve.kernels.window_attention import RowWindows, window_attention
from stu.attention import Scores
from stu.decoding.memory import window_pages


class WindowStep(StaticStep):
    """Static step of an `AttentionCache`.

    A row's own numbers are the place of its token among the positions of its pages, and its page
    table, filled up with the null page, which padding is written to as well.

    Args:
        pages: Pages `[pages, layers, 2, page_len, heads, head_dim]`, keys and values.
        scores: Scores of the keys in the window of every layer.
    """

    def __init__(self, pages: Tensor, scores: Scores) -> None:
        self._pages, self._scores = pages, scores
        self.num_own = 1 + window_pages(scores.window_tokens, pages.shape[3])

    def begin(self, rows: Tensor, shared: Tensor, own: Tensor) -> None:
        newest = own[:, 0].contiguous()
        self._windows = RowWindows(own[:, 1:], torch.zeros_like(newest), newest)
        self._places = torch.arange(len(rows), device=rows.device)
        """Places of the rows in `_windows`."""

    def step(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the outputs of one token of the rows, all `[B, 1, heads, head_dim]`."""
        new = queries[:, 0], keys[:, 0], values[:, 0]
        where = layer, self._windows, self._places
        attended = window_attention(self._pages, *where, *new, self._scores)
        return attended[:, None]
