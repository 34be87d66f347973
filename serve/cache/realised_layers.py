"""Long convolutions of a model in state-space form: what a plan of a cache of states needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from serve.cache.base import (
    Cache,
    CachePlan,
    CannotHold,
    ConvolutionCacheInfo,
    require_finite,
)
from stu.decoding.memory import state_size
from stu.mixers import LongConvolution, PastInputs
from stu.model import FlashSTU
from stu.realisation import NoRealisation, Realisation, fitting_realisation

BASES = {"mixed": "are not weighted sums of a few", "alternating": "do not alternate"}
"""Reasons why filters have no basis of a kind; `stu.mixers.PastInputs` defines them."""


@dataclass(frozen=True)
class RealisedLayers:
    """The long convolutions of a model and one realisation for all of them."""

    past: PastInputs
    basis: Tensor
    """Filters `[N, K]`."""
    weights: list[Tensor | None]
    """Weights `[K, C]` of the basis in the filters of each layer."""
    realisation: Realisation
    error: float

    def plan(self, page_len: int, itemsize: int, make: Callable[[int], Cache]) -> CachePlan:
        """Return the plan of a cache.

        page_len: Positions of a page. itemsize: Bytes of a number in it. make: As in the plan.
        """
        layers, rank = len(self.weights), self.realisation.rank
        size = state_size(self.past, layers, rank, page_len, itemsize)
        info = ConvolutionCacheInfo("state", size.page_bytes, rank, self.error)
        return CachePlan(size, make, info)


def realised_layers(
    model: FlashSTU, basis_kind: Literal["mixed", "alternating"]
) -> RealisedLayers | None:
    """Return the long convolutions of a model, or None if it has none.

    Raises CannotHold if their filters have another kind of basis, several ones, or no realisation.
    """
    layers = [mixer for mixer in model.mixers if isinstance(mixer, LongConvolution)]
    if not layers:
        return None
    past = layers[0].past
    if past.basis != basis_kind or any(layer.past != past for layer in layers):
        raise CannotHold(f"their filters {BASES[basis_kind]}")
    if not past.may_have_states:
        raise CannotHold("their layers divide sequences into streams")
    filters = model.filters.double()
    made = [layer.basis(filters) for layer in layers]
    bases = [own for own, _ in made]
    weights = [None if own is None else own.detach() for _, own in made]
    # Of all channels, so that ranks that divide them choose the same realisation.
    of_all = [layer.weights_of_all(filters) for layer in layers]
    of_all = [None if own is None else own.detach() for own in of_all]
    require_finite(*bases, *[own for own in of_all if own is not None])
    if not all(bases[0].equal(own) for own in bases):
        raise CannotHold("the filters of their layers have different bases")
    try:
        found, error = fitting_realisation(bases[0], of_all, model.filters.dtype)
    except NoRealisation as reason:
        raise CannotHold(str(reason)) from reason
    return RealisedLayers(past, bases[0], weights, found, error)
