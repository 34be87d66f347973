"""Turns of the sources of a mixture: the source of each position follows from weights alone."""

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from stu.common.errors import UserError
from stu.common.text import nearest

SHARE_BITS = 30
_Count = TypeVar("_Count", int, NDArray[np.int64])


class Part(TypedDict):
    """Weights of the sources in a part of a run."""

    until_step: int
    """Last optimizer step of the part; the next part, or `data.weights`, follows."""
    weights: dict[str, float]
    """Weight of each source by name; others have none."""


class Phase(NamedTuple):
    """Weights from one position of the order on."""

    start: int
    weights: dict[str, float]


class Turns:
    """Turns that sources take in proportion to their weights.

    Of the first `n` positions, a source of weight `w` (of 1) has `n * w` to within 2, for all `n`.
    The turn at a position is found without those before it, in time for the depth of a tree: an
    inner node of Huffman's tree over the weights divides `n` positions so that its left child has
    `round(n * share)` and the right one the rest. Either grows by 0 or 1 with `n`, so each position
    belongs to one leaf. A node has at most 2/3 of its parent's weight unless it is a leaf, so its
    error is at most `1/2 + 2/3 (1/2 + 2/3 (..)) = 3/2`, and that of a leaf at most `1/2 + 3/2`.

    weights: Numbers >= 0 by name, at least one above 0. Shares are rounded to 2**-30.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.names = sorted(weights)
        """Sources by number."""
        trees: list[tuple[float, int, _Tree]]  # weight, a number that decides ties, tree
        trees = [(weights[name], i, i) for i, name in enumerate(self.names) if weights[name] > 0]
        heapq.heapify(trees)
        for number in range(len(self.names), len(self.names) + len(trees) - 1):
            small, _, right = heapq.heappop(trees)
            large, _, left = heapq.heappop(trees)
            share = round(large / (small + large) * (1 << SHARE_BITS))
            heapq.heappush(trees, (small + large, number, _Node(share, left, right)))
        self._tree = trees[0][2]

    def __call__(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source at each position, and its number of positions before: `[n]` each."""
        sources, counts = np.empty_like(positions), np.empty_like(positions)

        def descend(tree: _Tree, within: NDArray[np.int64], places: NDArray[np.int64]) -> None:
            if isinstance(tree, int):
                sources[places], counts[places] = tree, within
                return
            left = _portion(within, tree.share)
            is_left = _portion(within + 1, tree.share) > left
            descend(tree.left, left[is_left], places[is_left])
            descend(tree.right, (within - left)[~is_left], places[~is_left])

        descend(self._tree, positions, np.arange(len(positions)))
        return sources, counts

    def counts(self, position: int) -> dict[str, int]:
        """Return how many of the first `position` positions each source has."""
        counts = dict.fromkeys(self.names, 0)
        trees = [(self._tree, position)]
        while trees:
            tree, count = trees.pop()
            if isinstance(tree, int):
                counts[self.names[tree]] = count
            else:
                left = _portion(count, tree.share)
                trees += [(tree.left, left), (tree.right, count - left)]
        return counts


class _Node(NamedTuple):
    share: int  # of the left child, times 2**SHARE_BITS
    left: "_Tree"
    right: "_Tree"


_Tree = int | _Node


def _portion(count: _Count, share: int) -> _Count:
    """Return `round(count * share / 2**SHARE_BITS)`, whose product would not fit into 64 bits."""
    high, low = count >> SHARE_BITS, count & ((1 << SHARE_BITS) - 1)
    return high * share + ((low * share + (1 << (SHARE_BITS - 1))) >> SHARE_BITS)


def check_weights(field: str, weights: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Return weights that add up to 1, by name of the source, without those that are 0.

    Raises UserError, naming `field`, for an unknown name or a weight that is not allowed.
    """
    for name, weight in weights.items():
        if name not in names:
            raise UserError(field, message=f"{field}: no source {name!r}{nearest(name, names)}")
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight < math.inf:
            raise UserError(f"{field}.{name}", weight, "a number >= 0")
    total = math.fsum(weights.values())
    if not total:
        raise UserError(field, dict(weights), "at least one weight above 0")
    return {name: weight / total for name, weight in weights.items() if weight}


def check_curriculum(curriculum: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Part]:
    """Return the parts of a curriculum with weights that add up to 1. Raises UserError."""
    parts: list[Part] = []
    for number, part in enumerate(curriculum):
        field = f"data.curriculum[{number}]"
        if set(part) != {"until_step", "weights"} or not isinstance(part["weights"], Mapping):
            raise UserError(field, dict(part), "an object of until_step and weights")
        before = parts[-1]["until_step"] if parts else 0
        step = part["until_step"]
        if not isinstance(step, int) or isinstance(step, bool) or step <= before:
            raise UserError(f"{field}.until_step", step, f"a whole number above {before}")
        weights = check_weights(f"{field}.weights", part["weights"], names)
        parts.append({"until_step": step, "weights": weights})
    return parts


def read_plan(rows: Sequence[Sequence[Any]], names: Sequence[str] | None) -> list[Phase]:
    """Return the phases in a checkpoint.

    Raises UserError if they have sources that are not in `names`, as the samples of these would be
    counted from the first one again; a hash of the text does not depend on the name of a source
    alone. With None, all names are allowed.
    """
    phases = [Phase(*row) for row in rows]
    known = {name for phase in phases for name in phase.weights}
    if names is not None and not known <= {*names}:
        before, now = (" ".join(sorted(own)) or "without a name" for own in (known, names))
        message = f"data.contents: the sources of the checkpoint's run are {before}, and these are "
        message += f"{now}; use the same names, or start a new run"
        raise UserError("data.contents", message=message)
    return phases


def plan_phases(
    past: Sequence[Phase],
    position: int,
    step: int,
    samples_per_step: int,
    curriculum: Sequence[Part],
    weights: dict[str, float],
) -> list[Phase]:
    """Return the phases of a run that continues at `position`, after `step` steps.

    Phases that began before are as in `past`. Then follow the parts of the curriculum that are not
    over, each until its step, and `weights`. Neighbours with equal weights are one phase.
    """
    phases = [phase for phase in past if phase.start < position]
    begin = 0
    for until, part in [
        *((p["until_step"], p["weights"]) for p in curriculum),
        (math.inf, weights),
    ]:
        start = position + max(0, begin - step) * samples_per_step
        if until > step and not (phases and phases[-1].weights == part):
            phases.append(Phase(start, part))
        begin = int(until) if until < math.inf else begin
    return phases
