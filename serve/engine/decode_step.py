"""One step of decoding over tensors that stay where they are, so that a GPU can replay it.

The host decides which rows step, and sends their numbers in one copy. The rest is a function of
tensors alone (`serve.cache.static_step`), the same on every device: captured as CUDA graphs for
some sizes of the batch, or run as it is. Batches are padded with a row that no sequence has.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from serve.adapters.layers import Adapters
from serve.cache.base import Cache
from serve.cache.static_step import StaticStep
from serve.config import INVARIANT_ROWS
from serve.engine.graphs import Graphs
from serve.engine.memory import StaticMemory
from serve.engine.step_state import ON_DEVICE, ROW, TOKEN, Copy, StepState, copy_in_order
from serve.kernels.modules import KernelRMSNorm
from serve.kernels.norm import add_norm
from stu.layers import LayerNorm, RMSNorm
from stu.mixers import Remembered
from stu.model import Block, FlashSTU
from stu.sequences.base import Sequences


class DecodeStep:
    """A model and the static steps of its caches.

    Args:
        model: As the engine runs it.
        unembed: Product with the embedding.
        caches: Caches by kind, and their static steps.
        last_tokens: Last token of each row that was chosen on the device, `[rows + 1]`; the last
            one is for padding.
        batch_invariant: Let rows go through the model in groups of a fixed size.
        captures: Capture CUDA graphs.
        copy: Copies numbers to the device.
        adapters: Adapters of the rows.
    """

    def __init__(
        self,
        model: FlashSTU,
        unembed: Callable[[Tensor], Tensor],
        caches: dict[type[Remembered], tuple[Cache, StaticStep]],
        last_tokens: Tensor,
        batch_invariant: bool,
        captures: bool,
        copy: Copy = copy_in_order,
        adapters: Adapters | None = None,
    ) -> None:
        self._adapters = adapters
        self._model, self._unembed = model, unembed
        self._caches = [cache for cache, _ in caches.values()]
        self._steps = [step for _, step in caches.values()]
        self._memory = StaticMemory({kind: step for kind, (_, step) in caches.items()})
        self._null_row = len(last_tokens) - 1
        self.batches = batch_sizes(self._null_row, batch_invariant)
        """Sizes, ascending, to which batches are padded."""
        self._rows_at_once = INVARIANT_ROWS if batch_invariant else self.batches[-1]
        self._last_tokens = last_tokens
        weight = model.embedding.weight
        self._state = StepState(self._steps, self.batches[-1], weight.device, copy)
        self.logits = weight.new_zeros(self.batches[-1], model.config.vocab_size)
        """Logits of the last step, `[max_batch, vocab_size]`."""
        self.graphs: Graphs | None = None
        if captures:
            functions: dict[str, Callable[[int], None]] = {"forward": self._forward}
            if any(step.ends_pages for step in self._steps):
                functions["end_pages"] = self._end_pages
            with torch.inference_mode():
                self._fill([], [], self.batches[-1])
                self.graphs = Graphs(weight.device)
                self.graphs.capture(functions, self.batches)

    def decode(self, rows: Sequence[int], tokens: Sequence[int | None]) -> Tensor:
        """Advance rows by a token, and return the logits `[B, vocab_size]` of the next, valid until
        the next call.

        rows: All rows of the batch, in ascending order. tokens: Their tokens; None: the last one
        chosen on the device.
        """
        batch = next(size for size in self.batches if size >= len(rows))
        ends_pages = self._fill(rows, tokens, batch)
        self._run("forward", batch)
        if ends_pages:
            self._run("end_pages", batch)
        for cache in self._caches:
            cache.advance_static()
        return self.logits[: len(rows)]

    def _fill(self, rows: Sequence[int], tokens: Sequence[int | None], batch: int) -> bool:
        """Send the numbers of a step, and return whether a layer's page ends in it."""
        numbers = self._state.fill()
        numbers.rows[:batch] = 0
        numbers.rows[:batch, ROW] = self._null_row
        numbers.rows[: len(rows), ROW] = rows
        numbers.rows[: len(rows), TOKEN] = [ON_DEVICE if own is None else own for own in tokens]
        ends_pages = False
        for cache, (shared, own) in zip(self._caches, numbers.by_cache, strict=True):
            ends_pages |= cache.begin_static(rows, shared, own[: len(rows)])
        self._state.send(batch)
        return ends_pages

    def _run(self, name: str, batch: int) -> None:
        if self.graphs is not None:
            self.graphs.replay(name, batch)
        elif name == "forward":
            self._forward(batch)
        else:
            self._end_pages(batch)

    def _forward(self, batch: int) -> None:
        """Compute the logits of a step from tensors alone."""
        shared, rows = self._state.on_device(batch)
        for first in range(0, batch, self._rows_at_once):
            group = rows[first : first + self._rows_at_once]
            self._begin(shared, group)
            known, chosen = group[:, TOKEN], self._last_tokens.index_select(0, group[:, ROW])
            tokens = torch.where(known == ON_DEVICE, chosen, known)
            if self._adapters is not None:
                self._adapters.begin_rows(group[:, ROW])
            hidden = next_hidden(self._model, tokens, self._memory)
            self.logits[first : first + len(group)].copy_(self._unembed(hidden))

    def _end_pages(self, batch: int) -> None:
        """Finish the pages of layers that end in a step, for all rows."""
        self._begin(*self._state.on_device(batch))
        for step in self._steps:
            if step.ends_pages:
                step.end_pages()

    def _begin(self, shared: Tensor, rows: Tensor) -> None:
        for index, step in enumerate(self._steps):
            step.begin(rows[:, ROW], *self._state.of_cache(index, shared, rows))


def next_hidden(model: FlashSTU, tokens: Tensor, memory: Sequences) -> Tensor:
    """Return what `model.hidden` does of one token of each row, `[B] -> [B, D]`. Each sum of the
    residual stream and a layer's output runs in one kernel with the norm that follows."""
    stream, added = model.embedding(tokens), None
    for block in model.blocks:
        assert isinstance(block, Block)
        for norm, layer in (
            (block.mixer_norm, partial(block.mixer, filters=model.filters, sequences=memory)),
            (block.mlp_norm, block.mlp),
        ):
            stream, normed = _add_norm(stream, added, norm)
            added = layer(normed[:, None])[:, 0]  # [B, D] -> [B, 1, D] -> [B, D]
    return _add_norm(stream, added, model.norm)[1]


def _add_norm(
    stream: Tensor, added: Tensor | None, norm: LayerNorm | RMSNorm | KernelRMSNorm
) -> tuple[Tensor, Tensor]:
    if isinstance(norm, LayerNorm):  # no kernel has it
        stream = stream if added is None else stream + added
        return stream, norm(stream)
    return add_norm(stream, added, norm.weight, norm.eps)


def batch_sizes(num_rows: int, batch_invariant: bool) -> list[int]:
    """Return the sizes, ascending, to which batches of up to `num_rows` are padded."""
    sizes = [] if batch_invariant else [1, 2, 4]
    sizes += range(8, num_rows + 8, 8)
    return [size for size in sizes if size < num_rows] + [
        next(size for size in sizes if size >= num_rows)
    ]
