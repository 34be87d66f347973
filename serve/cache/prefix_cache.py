"""Prefix cache: snapshots of sequences, found by the tokens that they begin with.

A prefix is known by the digests of its blocks of `BLOCK_TOKENS` tokens, each of which includes the
one before, and by the tokens after the last full block. Digests are cryptographic, so that no
request can be made to begin as another, and start from a salt, so that tenants do not find out each
other's prompts. The least recently used snapshot is dropped first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from serve.cache.base import Cache, Snapshot
from serve.cache.budget import Caches

BLOCK_TOKENS = 32
"""Tokens that are compared at once."""
MOST_BRANCHES = 8
"""Places of a prompt at which others part from it and snapshots are taken."""
MOST_SEEN_BLOCKS = 2**16
"""Blocks of earlier prompts that are remembered without a snapshot."""

Digests = list[bytes]
"""Digests of the full blocks of a sequence."""
_Key = tuple[bytes, tuple[int, ...]]
"""Digest of the last full block, and the tokens after it."""


@dataclass(frozen=True)
class _Entry:
    num_tokens: int
    snapshots: list[tuple[Cache, Snapshot]]
    num_bytes: int


def block_digests(tokens: Sequence[int], salt: str, known: Digests | None = None) -> Digests:
    """Return the digests of the full blocks of `tokens`.

    Args:
        tokens: Token ids.
        salt: Prefixes with different salts are different.
        known: Digests of the first blocks.
    """
    digests = list(known or ())
    root = blake2b(salt.encode(), digest_size=32, person=b"salt").digest()
    last = digests[-1] if digests else root
    for start in range(len(digests) * BLOCK_TOKENS, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = array("q", tokens[start : start + BLOCK_TOKENS]).tobytes()
        last = blake2b(last + block, digest_size=32).digest()
        digests.append(last)
    return digests


class PrefixCache:
    """Snapshots of all caches of a model.

    Args:
        caches: The caches. They state how many bytes snapshots may take.
    """

    def __init__(self, caches: Caches) -> None:
        self._caches, self._max_bytes = caches, caches.snapshot_bytes
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        """Snapshots, the least recently used first."""
        self._ends: dict[bytes, set[tuple[int, ...]]] = {}
        """Second parts of the keys of `_entries`, by the first."""
        self._seen: OrderedDict[bytes, int] = OrderedDict()
        """Number of prompts with each block, the least recently seen first."""
        self.num_bytes = 0
        """Bytes of all snapshots besides their pages."""

    @property
    def is_on(self) -> bool:
        """Whether there is room for snapshots."""
        return self._max_bytes > 0

    def see(self, digests: Digests) -> None:
        """Count a prompt."""
        for digest in digests:
            self._seen[digest] = self._seen.pop(digest, 0) + 1
        while len(self._seen) > MOST_SEEN_BLOCKS:
            self._seen.popitem(last=False)

    def branches(self, digests: Digests) -> list[int]:
        """Return the numbers of blocks, ascending, at which some of the prompts seen part from this
        one, so that a snapshot there helps them: at most `MOST_BRANCHES`, where most part."""
        counts = [self._seen.get(digest, 0) for digest in digests] + [0]
        for i in reversed(range(len(digests))):  # the first blocks may be forgotten before others
            counts[i] = max(counts[i], counts[i + 1])
        parting = [
            (counts[i] - counts[i + 1], i + 1)
            for i in range(len(digests))
            if counts[i] > max(1, counts[i + 1])
        ]
        return sorted(blocks for _, blocks in sorted(parting)[-MOST_BRANCHES:])

    def find(self, tokens: Sequence[int], digests: Digests) -> int:
        """Return the length of the longest prefix of `tokens` with a snapshot that leaves at least
        one token to prefill; 0 if there is none."""
        entry = self._find(tokens, digests)
        return entry.num_tokens if entry else 0

    def restore(self, row: int, tokens: Sequence[int], digests: Digests) -> int:
        """Let `row`, just admitted, continue from the prefix that `find` finds. Return its
        length."""
        entry = self._find(tokens, digests)
        if entry is None:
            return 0
        for cache, snapshot in entry.snapshots:
            cache.restore(row, snapshot)
        return entry.num_tokens

    def insert(self, row: int, tokens: Sequence[int], digests: Digests) -> None:
        """Remember `row`, which has all of `tokens`. `make_room` is to follow."""
        if len(tokens) < BLOCK_TOKENS or not self.is_on:
            return
        key = self._key(tokens, digests)
        if key in self._entries:
            self._entries.move_to_end(key)
            return
        snapshots = [(cache, cache.snapshot(row, len(tokens))) for cache in self._caches.all]
        num_bytes = sum(snapshot.num_bytes for _, snapshot in snapshots)
        self._entries[key] = _Entry(len(tokens), snapshots, num_bytes)
        self._ends.setdefault(key[0], set()).add(key[1])
        self.num_bytes += num_bytes

    def make_room(self) -> None:
        """Drop snapshots until the others keep to their bytes, and to pages that nobody was
        promised."""
        attention = self._caches.attention
        while self._entries and (
            self.num_bytes > self._max_bytes
            or (attention is not None and attention.num_kept > attention.num_free)
        ):
            self._drop(next(iter(self._entries)))

    def remove(self, tokens: Sequence[int], digests: Digests) -> None:
        """Forget the snapshot of all of `tokens`, if there is one."""
        key = self._key(tokens, digests)
        if key in self._entries:
            self._drop(key)

    def check_integrity(self) -> None:
        """Raise AssertionError if snapshots take more than they may, or are miscounted."""
        entries = self._entries.values()
        assert self.num_bytes == sum(entry.num_bytes for entry in entries) <= self._max_bytes
        assert {(end, rest) for end, rests in self._ends.items() for rest in rests} == set(
            self._entries
        ), "a prefix cannot be found"

    def _key(self, tokens: Sequence[int], digests: Digests) -> _Key:
        blocks, rest = divmod(len(tokens), BLOCK_TOKENS)
        return digests[blocks - 1] if blocks else b"", tuple(tokens[len(tokens) - rest :])

    def _drop(self, key: _Key) -> None:
        entry = self._entries.pop(key)
        for cache, snapshot in entry.snapshots:
            cache.drop(snapshot)
        digest, rest = key
        self._ends[digest].remove(rest)
        if not self._ends[digest]:
            del self._ends[digest]
        self.num_bytes -= entry.num_bytes

    def _find(self, tokens: Sequence[int], digests: Digests) -> _Entry | None:
        most = len(tokens) - 1
        for blocks in range(min(len(digests), most // BLOCK_TOKENS), 0, -1):
            start = blocks * BLOCK_TOKENS
            ends = [
                rest
                for rest in self._ends.get(digests[blocks - 1], ())
                if len(rest) <= most - start and rest == tuple(tokens[start : start + len(rest)])
            ]
            if ends:
                key = digests[blocks - 1], max(ends, key=len)
                self._entries.move_to_end(key)
                return self._entries[key]
        return None
