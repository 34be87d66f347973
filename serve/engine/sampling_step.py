"""Choice of the next tokens over tensors that stay where they are, so that a GPU can replay it.

A step of the sampler takes a few operations for greedy rows, and more than a hundred where top-p
leaves tokens out. The kinds of work that most requests need are captured as CUDA graphs, or run as
they are; steps that need other work, such as penalties, masks or log probabilities, are left to the
caller.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from serve.engine.graphs import Graphs
from serve.engine.step_state import ROW, TOKEN, Copy, StepState, copy_in_order
from serve.sampling.features import ALL, FEW, GREEDY, Features
from serve.sampling.sampler import DeviceSampler, Sampled

TRUNCATING = frozenset({"top_k", "top_p", "min_p"})
KINDS = {
    "greedy": GREEDY,
    "random": Features(is_random=True, most_kept=ALL),
    "few": Features(TRUNCATING, is_random=True, most_kept=FEW),
    "truncated": Features(TRUNCATING, is_random=True, most_kept=ALL),
}
"""Kinds of work, the least first."""
UNIFORM = TOKEN
"""Place of a row's random number, in its bits, in that of the token of a decoding step."""


class SamplingStep:
    """Samples a token for each row of a decoding step.

    Args:
        sampler: Samples the tokens. Its null row is the last one.
        logits: Where steps leave their logits, `[max_batch, vocab_size]`.
        last_tokens: Where the next step finds the tokens, `[rows + 1]`.
        batches: Sizes, ascending, to which batches are padded.
        graphs: Captures the steps; None: they run as they are.
        copy: Copies numbers to the device.
    """

    def __init__(
        self,
        sampler: DeviceSampler,
        logits: Tensor,
        last_tokens: Tensor,
        batches: Sequence[int],
        graphs: Graphs | None,
        copy: Copy = copy_in_order,
    ) -> None:
        self._sampler, self._logits, self._last_tokens = sampler, logits, last_tokens
        self._batches, self._graphs = batches, graphs
        device = logits.device
        self._state = StepState([], len(logits), device, copy)
        self._tokens = torch.zeros(len(logits), dtype=torch.int64, device=device)
        self._flags = torch.zeros(2, len(logits), dtype=torch.bool, device=device)
        self._functions: dict[str, Callable[[int], None]] = {
            kind: partial(self._sample, features) for kind, features in KINDS.items()
        }
        if graphs is not None:
            with torch.inference_mode():
                self._send([], [], batches[-1])
                graphs.capture(self._functions, batches)

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, rows: Sequence[int], uniforms: Sequence[float], features: Features
    ) -> Sampled | None:
        """Sample the next token of each row, which the next step finds, as `DeviceSampler.sample`
        does. None, and nothing is done, for other logits than those of the last step's rows, and
        for other work. What is returned is valid until the next call.
        """
        kind = next((name for name, own in KINDS.items() if features | own == own), None)
        is_static = logits.data_ptr() == self._logits.data_ptr() and len(logits) == len(rows)
        if kind is None or not is_static:
            return None
        batch = next(size for size in self._batches if size >= len(rows))
        self._send(rows, uniforms, batch)
        self._run(kind, batch)
        is_finite, is_allowed = self._flags[:, : len(rows)]
        return Sampled(self._tokens[: len(rows)], is_finite, is_allowed, None)

    def _send(self, rows: Sequence[int], uniforms: Sequence[float], batch: int) -> None:
        numbers = self._state.fill().rows[:batch]
        numbers[:, ROW], numbers[:, UNIFORM] = self._sampler.null_row, 0
        numbers[: len(rows), ROW] = rows
        numbers[: len(rows), UNIFORM] = np.array(uniforms, dtype=np.float64).view(np.int64)
        self._state.send(batch)

    def _run(self, kind: str, batch: int) -> None:
        if self._graphs is not None:
            self._graphs.replay(kind, batch)
        else:
            self._functions[kind](batch)

    def _sample(self, features: Features, batch: int) -> None:
        """Sample from tensors alone."""
        numbers = self._state.on_device(batch)[1].T.contiguous()  # [B, 2] -> [2, B]
        rows, uniforms = numbers[ROW], numbers[UNIFORM].view(torch.float64)
        sampled = self._sampler.sample(self._logits[:batch], rows, uniforms, features)
        self._tokens[:batch].copy_(sampled.tokens)
        self._flags[0, :batch].copy_(sampled.is_finite)
        self._flags[1, :batch].copy_(sampled.is_allowed)
        self._last_tokens.index_copy_(0, rows, sampled.tokens)
