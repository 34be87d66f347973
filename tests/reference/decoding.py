"""Decodes a batch of sequences of different lengths in step, through any online convolution."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stu.attention import Scores, alibi_slopes, attend, sliding_window_attention
from stu.convolution import short_convolution
from stu.futurefill import Continuous
from stu.mixers import KeyWindow, LastInputs, Memory, PastInputs, remembered
from stu.model import FlashSTU
from stu.online_convolution import OnlineConvolution


class Runner(Memory):
    """The memory of a batch, and the model over it: `prefill` once, then `step` by step.

    prompts: Token ids of each of B rows. max_new_tokens: Steps of every row.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: FlashSTU,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        convolution: type[OnlineConvolution] = Continuous,
    ) -> None:
        self._model, self._prompts = model, prompts
        config, device = model.config, model.embedding.weight.device
        wide_taps, lag_step = model.convolution_taps()
        taps = wide_taps.to(model.filters.dtype)
        # The full form convolves each channel of a row as a sequence of its own.
        self._streams_per_row = max(
            [past.streams for past in remembered(model.mixers, PastInputs)], default=1
        )
        num_streams = len(prompts) * self._streams_per_row
        self._convolution = convolution(taps, num_streams, max_new_tokens, lag_step)

        longest = max(map(len, prompts)) + max_new_tokens
        size = min(config.window_tokens + 1, longest)
        shape = 2, len(remembered(model.mixers, KeyWindow)), len(prompts), config.num_heads, size
        # Attention sums in float32 at least: kept as it is read, no step converts the window.
        dtype = torch.promote_types(model.embedding.weight.dtype, torch.float32)
        self._keys, self._values = torch.zeros(*shape, config.head_dim, dtype=dtype, device=device)
        """Rings `[attn_layers, B, heads, size, head_dim]`: new token t of every row lies in slot
        `t % size`, and its prompt, whose last token has t = -1, just before."""
        self._slots = torch.arange(size, device=device)
        self._last_inputs = [
            model.embedding.weight.new_zeros(len(prompts), short.num_taps - 1, short.channels)
            for short in remembered(model.mixers, LastInputs)
        ]
        """Inputs of each short convolution: `[B, J - 1, C]`."""
        self._lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        slopes = alibi_slopes(config.num_heads).to(device)
        self._scores = Scores(slopes, config.window_tokens, config.softcap)
        self._distances = torch.empty(0)
        self._prefilling: int | None = None
        """The row whose prompt runs through the model; None while all rows step."""

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        """Take in the prompts, one after the other; return `[B, vocab_size]`, the logits of each
        row's first new token."""
        last = []
        for row, prompt in enumerate(self._prompts):
            self._prefilling = row
            tokens = torch.tensor([prompt], device=self._slots.device)
            last.append(self._model.hidden(tokens, self)[:, -1])  # [1, P, D] -> [1, D]
        self._prefilling = None
        return self._model.logits(torch.cat(last))

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Take each row's next token `[B]`; return the logits `[B, vocab_size]` of the one after.

        Raises ValueError after `max_new_tokens` steps.
        """
        step, size = self._convolution.position, len(self._slots)
        distances = (step - self._slots) % size
        empty = distances > self._lengths[:, None] + step  # not written yet: [B, size]
        self._distances = distances.masked_fill(empty, -1)[:, None, None]  # -> [B, 1, 1, size]
        hidden = self._model.hidden(tokens[:, None], self)[:, 0]  # [B, 1, D] -> [B, D]
        self._convolution.advance()
        return self._model.logits(hidden)

    def continue_convolution(self, number: int, streams: Tensor) -> Tensor:
        """Take one prompt, or one token of each row."""
        if self._prefilling is None:
            return self._convolution.step(number, streams[:, 0])[:, None]
        start = self._prefilling * self._streams_per_row
        rows = slice(start, start + self._streams_per_row)
        return self._convolution.prefill(number, streams, rows)

    def continue_short_convolution(self, number: int, inputs: Tensor, taps: Tensor) -> Tensor:
        """Take one prompt, or one token of each row."""
        row = self._prefilling
        held = self._last_inputs[number][slice(None) if row is None else slice(row, row + 1)]
        before = held.clone()
        held[:] = torch.cat([before, inputs], dim=1)[:, -held.shape[1] :]
        return short_convolution(torch.cat([before, inputs], dim=1), taps)

    def continue_attention(
        self, number: int, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Take one prompt, or one token of each row."""
        size = len(self._slots)
        if self._prefilling is not None:
            kept = min(size, keys.shape[1])
            for ring, new in ((self._keys, keys), (self._values, values)):
                ring[number, self._prefilling, :, size - kept :] = new[0, -kept:].transpose(0, 1)
            return sliding_window_attention(queries, keys, values, self._scores)
        slot = self._convolution.position % size
        self._keys[number, :, :, slot] = keys[:, 0]
        self._values[number, :, :, slot] = values[:, 0]
        attended = attend(
            queries.transpose(1, 2).to(self._keys.dtype),  # -> [B, heads, 1, head_dim]
            self._keys[number],
            self._values[number],
            self._distances,
            self._scores,
        )
        return attended.transpose(1, 2).to(queries.dtype)
