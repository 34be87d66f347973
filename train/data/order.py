"""The order of samples: a permutation that needs no memory and starts at any position."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from train.data.weights import Phase, Turns

ROUNDS = 8


class SampleOrder:
    """The order of the samples of one or more sources.

    In each phase the sources take turns by their weights. A source has epochs of its own: its turn
    `k`, counted over all phases, is sample `Permutation(n, seed, k // n)(k % n)` of its `n`. So the
    sample at a position depends on `sizes`, `seed` and the phases until then alone, and is found
    without those before it.

    Args:
        sizes: Number of samples of each source by name. A source alone may have no name.
        seed: Seed of the permutations, to which the name of a source is added.
        phases: Weights from a position on, the first from 0; sources with a weight have samples.
    """

    def __init__(self, sizes: Mapping[str, int], seed: int, phases: Sequence[Phase]) -> None:
        self._sizes = list(sizes.values())
        self._seeds = [f"{seed},{name}" if name else str(seed) for name in sizes]
        self._numbers = {name: number for number, name in enumerate(sizes)}
        self._starts = np.array([phase.start for phase in phases])
        self._turns = [Turns(phase.weights) for phase in phases]
        self._before = [dict.fromkeys(sizes, 0)]  # turns of each source before each phase
        for turns, length in zip(self._turns, np.diff(self._starts).tolist(), strict=False):
            counts = turns.counts(length)
            last = self._before[-1]
            self._before.append({name: last[name] + counts.get(name, 0) for name in sizes})

    def __call__(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the number of the source and of its sample at each position: `[n]` each."""
        sources, samples = np.empty_like(positions), np.empty_like(positions)
        phase_of = np.searchsorted(self._starts, positions, side="right") - 1
        for phase in np.unique(phase_of).tolist():
            places = np.flatnonzero(phase_of == phase)
            taken, counts = self._turns[phase](positions[places] - self._starts[phase])
            for turn in np.unique(taken).tolist():
                name = self._turns[phase].names[turn]
                own = taken == turn
                number = self._numbers[name]
                sources[places[own]] = number
                samples[places[own]] = self._shuffled(
                    number, counts[own] + self._before[phase][name]
                )
        return sources, samples

    def num_read(self, position: int) -> dict[str, int]:
        """Return the number of samples of each source among the first `position`, all epochs."""
        phase = max(0, int(np.searchsorted(self._starts, position)) - 1)
        counts = self._turns[phase].counts(position - int(self._starts[phase]))
        return {name: count + counts.get(name, 0) for name, count in self._before[phase].items()}

    def _shuffled(self, source: int, turns: NDArray[np.int64]) -> NDArray[np.int64]:
        size = self._sizes[source]
        epochs, within = np.divmod(turns, size)
        samples = np.empty_like(turns)
        for epoch in np.unique(epochs).tolist():
            order = Permutation(size, self._seeds[source], epoch)
            samples[epochs == epoch] = order(within[epochs == epoch])
        return samples


class Permutation:
    """A pseudo-random bijection of `0 .. n-1` that depends on `(n, seed, epoch)` only.

    A Feistel network permutes the numbers below the smallest power of four that is at least `n`;
    results that are not below `n` go through it again (cycle walking, less than four times on
    average). So reading a part of the order takes time for its length and not for `n`. Source:
    Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002.
    """

    def __init__(self, n: int, seed: int | str, epoch: int) -> None:
        assert n >= 1, "a permutation needs at least one element"
        self._n = np.uint64(n)
        self._half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        key = hashlib.blake2b(f"{seed},{epoch}".encode(), digest_size=8 * ROUNDS).digest()
        self._round_keys = np.frombuffer(key, dtype="<u8")

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the elements at `positions`, each in `0 .. n-1`, in an array of the same shape."""
        values = positions.astype(np.uint64)
        assert (values < self._n).all(), "positions must be in 0 .. n-1"
        values = self._encrypt(values)
        while (outside := values >= self._n).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & self._half_mask)
        return left << self._half_bits | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix all bits with the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
