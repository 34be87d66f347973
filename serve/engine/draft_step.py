"""Steps that take several tokens of a row, of which the caches keep those that turn out right."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

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
        logits: Function of hidden states `[N, D]` that returns logits `[N, vocab_size]`.
        batch_invariant: Let tokens go through the model in groups of a fixed size.
    """

    def __init__(
        self,
        model: FlashSTU,
        caches: Caches,
        logits: Callable[[Tensor], Tensor],
        batch_invariant: bool,
    ) -> None:
        self._model, self._caches, self._logits = model, caches, logits
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
        hidden = self._hidden([tokens[place][ahead] for ahead, place in places])
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

    def _hidden(self, tokens: Sequence[int]) -> Tensor:
        """Return the hidden states `[N, D]` of tokens, the earlier of each row first. A layer takes
        all groups before the next layer does: those of one row depend on one another."""
        model = self._model
        at_once = INVARIANT_ROWS if self._batch_invariant else len(tokens)
        padded = [*tokens, *[0] * (-len(tokens) % at_once)]
        ids = torch.tensor(padded, device=model.embedding.weight.device)[:, None]
        groups = [model.embedding(own) for own in torch.split(ids, at_once)]  # [group, 1, D] each
        for block in model.blocks:
            groups = [
                self._through(block, own, number * at_once) for number, own in enumerate(groups)
            ]
        return torch.cat([model.norm(own) for own in groups])[: len(tokens), 0]

    def _through(self, block: nn.Module, group: Tensor, first: int) -> Tensor:
        hidden: Tensor = block(group, self._model.filters, RowMemory(self._caches, first))
        return hidden
