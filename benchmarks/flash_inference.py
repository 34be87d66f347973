"""The schedule of Flash Inference, to compare FutureFill with.

Oncescu, Purandare, Idreos and Kakade, "Flash Inference: Near Linear Time Inference for Long
Convolution Sequence Models and Beyond", arXiv:2410.12982: relaxed multiplication of a fixed filter
with inputs that come one by one. Once position i is done (counted from 1), the tile of the last
`lowbit(i)` inputs is convolved into as many outputs after it. Those are the tiles of
`stu.futurefill.Continuous`. What differs in the mode that is measured here is the prompt, and with
it the memory: the schedule is applied to prompt and generation alike. Positions are counted from
the prompt's first token, its inputs stay in the buffer, and reach the tokens after it through the
tiles of one tree over both. FutureFill adds a prompt to all outputs after it at once, and then
needs no more than a slot for each new token.

As there, small tiles are summed directly: those within a page of columns.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from stu.convolution import causal_convolution
from stu.futurefill import Continuous, future_fill


class FlashInference(Continuous):
    """Buffers of `prompt_tokens + max_new_tokens` positions, in which `position` counts from the
    prompt's first token. A shorter prompt ends where the longest does."""

    def __init__(
        self,
        taps: Tensor,
        batch: int,
        max_new_tokens: int,
        lag_step: int = 1,
        page_columns: int = 32,
        prompt_tokens: int = 1,
    ) -> None:
        super().__init__(taps, batch, prompt_tokens + max_new_tokens, lag_step, page_columns)
        self.prompt_tokens = prompt_tokens
        self.position = prompt_tokens
        self._place = prompt_tokens % (self.page_columns * lag_step)

    def prefill(self, layer: int, inputs: Tensor, rows: slice = slice(None)) -> Tensor:
        outputs = causal_convolution(inputs, self.taps[layer], self.lag_step)
        missing = self.prompt_tokens - inputs.shape[1]
        wide = pad(inputs.to(self.taps.dtype), (0, 0, missing, 0))  # [B, P, D]
        page_tokens = self.page_columns * self.lag_step
        pages = self.prompt_tokens // page_tokens
        slots = self._slots[layer, :, rows]  # [g, B, D, columns]
        whole = wide[:, : pages * page_tokens]
        slots[..., : pages * self.page_columns] = self._columns(whole)
        self._fill_from_whole_pages(pages, slots, layer)
        if pages * self.page_columns < self.num_columns:
            self._begin_page(pages, wide[:, pages * page_tokens :], layer, rows)
        return outputs

    def _fill_from_whole_pages(self, pages: int, slots: Tensor, layer: int) -> None:
        """The tiles that end within the prompt, as far as they reach beyond its whole pages."""
        start, end = pages * self.page_columns, pages
        while end > 0:
            size = end & -end
            first, last = (end - size) * self.page_columns, end * self.page_columns
            reached = min((end + size) * self.page_columns, self.num_columns)
            if reached > start:
                added = future_fill(slots[..., first:last], self._filters[layer], reached - last)
                slots[..., start:reached] += added[..., start - last :]
            end -= size

    def _begin_page(self, page: int, inputs: Tensor, layer: int, rows: slice) -> None:
        """The page that the first new token is in, after those of the prompt that are in it too."""
        first, done = page * self.page_columns, inputs.shape[1]
        pending = self._slots[layer, :, rows, :, first : first + self.page_columns]
        columns = pending.shape[-1]
        tokens = pending.permute(1, 3, 0, 2).flatten(1, 2).clone()  # [B, columns g, D]
        if done:
            within = causal_convolution(
                inputs, self.taps[layer], self.lag_step, columns * self.lag_step
            )
            tokens += within
            tokens[:, :done] = inputs
        phases = tokens.unflatten(1, (columns, self.lag_step))  # [B, columns, g, D]
        self._page[:columns, layer, :, rows] = phases.permute(1, 2, 0, 3)

    def _columns(self, tokens: Tensor) -> Tensor:
        """`[B, T, D] -> [g, B, D, T / g]`."""
        return torch.stack([tokens[:, i :: self.lag_step] for i in range(self.lag_step)]).mT
