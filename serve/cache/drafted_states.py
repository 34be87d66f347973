"""Steps of several tokens of a row in caches of states, of which only the first may be kept.

Tokens go through a layer one by one, as in so many steps, and the layer's page ends where it would.
Before that, what the page has is copied. To forget the last tokens, a layer goes back to the last
copy before them and takes the inputs that are kept once more. So nothing differs, to the last bit,
from what steps of one token leave.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from serve.cache.base import DraftedToken
from serve.cache.spectral_state import SpectralStates


@dataclass
class _Copy:
    """A layer's page of a row, before it takes more tokens."""

    num_tokens: int
    """Tokens of the step that it has taken."""
    page: list[Tensor]
    state: Tensor | None = None
    """State before the page, once the page has ended."""
    joined_at: int = 0
    """Place in the page at which the row joined."""


@dataclass
class _Drafts:
    """Tokens that a layer has taken of a row in this step."""

    copies: list[_Copy]
    """Copies of its pages, the earliest first."""
    inputs: list[Tensor] = field(default_factory=list)
    """Inputs of the tokens."""


class DraftedStates(SpectralStates):
    """Spectral states that take several tokens of a row in a step."""

    streams: int
    """Inputs of a token in the arguments of `step`."""
    _tokens: Sequence[DraftedToken] = ()
    """Tokens of the step, if it takes several of a row."""

    def begin_drafts(self, tokens: Sequence[DraftedToken], alone: bool) -> None:
        self._tokens = list(tokens)
        self._drafts: dict[tuple[int, int], _Drafts] = {}
        """Drafts by row and layer."""

    def keep(self, row: int, num_tokens: int) -> None:
        for layer in range(self._states.shape[1]):
            drafts = self._drafts.pop((row, layer))
            if num_tokens < len(drafts.inputs):
                self._go_back(row, layer, drafts, num_tokens)
        self._clocks.move(row, num_tokens)

    def advance_drafts(self) -> None:
        self._tokens = []
        self._clocks.align(self._rows)
        self._change_rows(self._rows)

    def _step_drafts(self, layer: int, inputs: Tensor, first: int) -> Tensor:
        """Do as `step`, for the tokens of the step of drafts from the `first`."""
        outputs = torch.zeros_like(inputs)
        parts = zip(
            torch.split(inputs, self.streams), torch.split(outputs, self.streams), strict=True
        )
        for token, (own, output) in zip(self._tokens[first:], parts, strict=False):
            self._take(layer, token.row, own, output)
        return outputs

    def _take(self, layer: int, row: int, inputs: Tensor, output: Tensor) -> None:
        """Take a token into a layer's page of a row, and end the page if it is full."""
        drafts = self._drafts.get((row, layer))
        if drafts is None:
            drafts = self._drafts[row, layer] = _Drafts([self._copy(row, layer, 0)])
        place = self._place(row, layer, len(drafts.inputs))
        drafts.inputs.append(inputs)
        output.copy_(self._step_rows(layer, place, slice(row, row + 1), inputs))
        if place + 1 == self._page_len:
            copy = drafts.copies[-1]
            copy.state = self._states[row, layer].clone()
            copy.joined_at = int(self._joined_at[row, layer])
            self._end_page(row, layer)
            drafts.copies.append(self._copy(row, layer, len(drafts.inputs)))

    def _copy(self, row: int, layer: int, num_tokens: int) -> _Copy:
        return _Copy(num_tokens, [tensor[row, layer].clone() for tensor in self._page_tensors()])

    def _go_back(self, row: int, layer: int, drafts: _Drafts, num_tokens: int) -> None:
        """Forget all but the first tokens of this step."""
        copy = [copy for copy in drafts.copies if copy.num_tokens <= num_tokens][-1]
        for tensor, page in zip(self._page_tensors(), copy.page, strict=True):
            tensor[row, layer] = page
        if copy.state is not None:
            self._states[row, layer] = copy.state
            self._joined_at[row, layer] = copy.joined_at
        for ahead in range(copy.num_tokens, num_tokens):
            place = self._place(row, layer, ahead)
            self._step_rows(layer, place, slice(row, row + 1), drafts.inputs[ahead])

    def _place(self, row: int, layer: int, ahead: int = 0) -> int:
        """Return the place in a layer's page of a row's next token, or of one after it."""
        return (self._clocks.of(row) + ahead + self._offsets[layer]) % self._page_len

    @abstractmethod
    def _page_tensors(self) -> list[Tensor]:
        """Return what changes within a page, `[rows, layers, ..]` each."""

    @abstractmethod
    def _step_rows(self, layer: int, place: int, rows: slice, inputs: Tensor) -> Tensor:
        """Return the outputs of one token of consecutive rows at a place of the layer's page, valid
        until the next call: inputs and outputs as of `step`."""
