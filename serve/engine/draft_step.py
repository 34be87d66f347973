"""Steps that take several tokens of a row, of which the caches keep those that turn out right."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from serve.adapters.layers import Adapters
from serve.cache.base import DraftedToken
from serve.cache.budget import Caches
from serve.config import INVARIANT_ROWS
from serve.engine.memory import RowMemory
from stu.model import FlashSTU


class DraftStep:
    """Steps of drafts. Dense layers take all tokens together, and caches take them one by one.

    Args:
        model: As the engine runs it.
        caches: Its caches.
        adapters: Adapters beside its layers.
        logits: Function of hidden states `[N, D]` that returns logits `[N, vocab_size]`.
        batch_invariant: Let tokens go through the model in groups of a fixed size.
    """

    def __init__(
        self,
        model: FlashSTU,
        caches: Caches,
        adapters: Adapters,
        logits: Callable[[Tensor], Tensor],
        batch_invariant: bool,
    ) -> None:
        self._model, self._caches, self._adapters = model, caches, adapters
        self._logits = logits
        self._batch_invariant = batch_invariant
        self._kept: dict[int, int] = {}
        """Tokens of each row in the step that it keeps, until caches have forgotten the others."""

    def most_tokens(self, row: int) -> int | None:
        """Return the most tokens of a row that the next step may take; None: any number."""
        limits = [cache.most_tokens(row) for cache in self._caches.all]
        return min((most for most in limits if most is not None), default=None)

    @torch.inference_mode()
    def run(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[Tensor]:
        """Take the next tokens of each row of the batch, and return the logits that follow each of
        them, `[tokens of the row, vocab_size]`. The first of a row is kept.

        rows: All rows of the batch, in ascending order. tokens: Their tokens, at least one each.
        """
        places = [
            (ahead, place)
            for ahead in range(max(map(len, tokens)))
            for place in range(len(rows))
            if ahead < len(tokens[place])
        ]
        drafted = [DraftedToken(rows[place], ahead) for ahead, place in places]
        for cache in self._caches.all:
            cache.begin_drafts(drafted, alone=self._batch_invariant)
        ids = [tokens[place][ahead] for ahead, place in places]
        hidden = self._hidden(ids, [token.row for token in drafted])
        self._kept = dict.fromkeys(rows, 1)
        logits = self._logits(hidden)
        order = [[i for i, (_, other) in enumerate(places) if other == p] for p in range(len(rows))]
        return [logits[torch.tensor(own, device=logits.device)] for own in order]

    def accept(self, row: int) -> None:
        """Keep one more token of a row."""
        self._kept[row] += 1

    def settle(self, row: int) -> None:
        """Forget the tokens of a row that are not kept, if it is in a step of drafts."""
        count = self._kept.pop(row, None)
        if count is not None:
            for cache in self._caches.all:
                cache.keep(row, count)

    def finish(self) -> None:
        """Finish the step for all rows."""
        for row in list(self._kept):
            self.settle(row)
        for cache in self._caches.all:
            cache.advance_drafts()

    def _hidden(self, tokens: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Return the hidden states `[N, D]` of tokens of rows, the earlier of each row first. A
        layer takes all groups before the next layer does: those of one row depend on one another.
        """
        model, device = self._model, self._model.embedding.weight.device
        at_once = INVARIANT_ROWS if self._batch_invariant else len(tokens)
        missing = [0] * (-len(tokens) % at_once)
        ids = torch.tensor([*tokens, *missing], device=device)[:, None]
        own_rows = torch.split(torch.tensor([*rows, *missing], device=device), at_once)
        groups = [model.embedding(own) for own in torch.split(ids, at_once)]  # [group, 1, D] each
        for block in model.blocks:
            for number, own in enumerate(own_rows):
                self._adapters.begin_rows(own)
                memory = RowMemory(self._caches, number * at_once)
                groups[number] = block(groups[number], model.filters, memory)
        return torch.cat([model.norm(own) for own in groups])[: len(tokens), 0]
