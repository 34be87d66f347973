"""The order of samples: a permutation that needs no memory and starts at any position."""

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8


class Permutation:
    """A pseudo-random bijection of `0 .. n-1` that depends on `(n, seed, epoch)` only.

    A Feistel network permutes the numbers below the smallest power of four that is at least `n`;
    results that are not below `n` go through it again (cycle walking, less than four times on
    average). So reading a part of the order takes time for its length and not for `n`. Source:
    Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
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
