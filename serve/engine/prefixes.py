"""Which prefixes an engine remembers, and which of its requests begin with them.

Snapshots are taken at the ends of chunks and of the prompt, before the last tokens of a long one,
which the same prompt then finds, when a request ends or is preempted, and where earlier or waiting
prompts go on differently: the first of several with a common prefix computes it, and the others
wait for that. Requests that generate nothing leave snapshots only
where prompts part.

Where the batch is invariant, sums must not depend on what is remembered. So all prompts are divided
at the same places, `INVARIANT_CHUNK` tokens apart, and snapshots are taken by prefill at these
alone.
"""

from collections.abc import Sequence
from dataclasses import replace

from serve.cache.budget import Caches
from serve.cache.prefix_cache import BLOCK_TOKENS, PrefixCache, block_digests
from serve.config import EngineConfig
from serve.engine.job import Job
from serve.engine.prefill import Prompt

INVARIANT_CHUNK = 8 * BLOCK_TOKENS
"""Tokens of a chunk where the batch is invariant, at most."""
LONG_PROMPT = 8 * BLOCK_TOKENS
"""Tokens to prefill from which a prompt counts as long."""


class Prefixes:
    """The prefix cache of an engine.

    Args:
        caches: The engine's caches.
        config: Limits.
    """

    def __init__(self, caches: Caches, config: EngineConfig) -> None:
        self._cache = PrefixCache(caches)
        self._is_invariant = config.batch_invariant
        self.chunk_len = config.prompt_tokens_per_step
        """Tokens of a chunk of a prompt, at most."""
        if self._is_invariant:
            self.chunk_len = min(self.chunk_len, INVARIANT_CHUNK)
        self.tokens_asked = 0
        """Prompt tokens of admitted requests that use the cache."""
        self.tokens_found = 0
        """How many of them were remembered."""

    def add(self, job: Job) -> None:
        """Count the prompt of a new job among those that others may begin like."""
        if self._cache.is_on and job.most_skipped:
            job.digests = block_digests(job.request.prompt_token_ids, job.request.prefix_salt)
            self._cache.see(job.digests)

    def num_found(self, job: Job, num_tokens: int) -> int:
        """Return how many of the first `num_tokens` tokens of `job` are remembered."""
        if not job.digests:
            return 0
        tokens = job.tokens[: min(num_tokens, job.most_skipped + 1)]
        return self._cache.find(tokens, job.digests)

    def waits_for(self, job: Job, group: Sequence[Job], num_found: int) -> bool:
        """Return whether a job of `group` computes a prefix of `job` that is not remembered."""
        if not job.digests:
            return False
        usable = job.digests[: min(job.num_tokens - 1, job.most_skipped) // BLOCK_TOKENS]
        common = (_num_common(usable, other.digests or ()) for other in group)
        return any(BLOCK_TOKENS * blocks > num_found for blocks in common)

    def make_room(self) -> None:
        """Leave the pages to rows that they have been promised."""
        self._cache.make_room()

    def check_integrity(self) -> None:
        """Raise AssertionError if snapshots take more than they may."""
        self._cache.check_integrity()

    def begin(self, job: Job, prompt: Prompt) -> Prompt:
        """Let the row of `job`, just admitted, continue from what is remembered of `prompt`, and
        return the rest with the places where snapshots are taken."""
        if job.digests is None:
            return prompt
        length = len(prompt.tokens)
        job.digests = block_digests(prompt.tokens, job.request.prefix_salt, job.digests)
        tokens = prompt.tokens[: job.most_skipped + 1]
        start = self._cache.restore(prompt.row, tokens, job.digests)
        if job.cached_tokens is None:
            num_prompt_tokens = len(job.request.prompt_token_ids)
            job.cached_tokens = min(start, num_prompt_tokens)  # not new tokens of another engine
            self.tokens_asked += num_prompt_tokens
            self.tokens_found += job.cached_tokens
        usable = job.digests[: (length - 1) // BLOCK_TOKENS]
        places = [BLOCK_TOKENS * blocks for blocks in self._cache.branches(usable)]
        ends = [length - 1, length] if job.steps_to_come else []
        if self._is_invariant:
            chunk = self.chunk_len
            job.snapshots_at = frozenset(place // chunk * chunk for place in [*places, *ends])
            return replace(prompt, start=start)
        if not ends:
            job.snapshots_at = frozenset(places)
        elif length - start >= LONG_PROMPT:  # a small chunk more takes no time beside it
            places.append(BLOCK_TOKENS * len(usable))
        stops = sorted({place for place in places if place > start})
        return replace(prompt, start=start, stops=stops)

    def reached(self, job: Job, num_tokens: int) -> None:
        """Take a snapshot of `job`, whose first `num_tokens` tokens have been prefilled, if it is
        wanted there."""
        if job.digests is not None and (job.snapshots_at is None or num_tokens in job.snapshots_at):
            self._cache.insert(job.row, job.tokens[:num_tokens], job.digests)
            self._cache.make_room()

    def keep(self, job: Job) -> None:
        """Take a snapshot of a running job, which leaves the batch; `make_room` is to follow."""
        generates = job.request.sampling.max_new_tokens > 0
        if job.digests is not None and generates and not self._is_invariant:
            tokens = job.tokens[: job.num_seen]
            job.digests = block_digests(tokens, job.request.prefix_salt, job.digests)
            self._cache.insert(job.row, tokens, job.digests)

    def forget(self, job: Job) -> None:
        """Forget the snapshot that `keep` may have taken of a job, whose logits were not finite."""
        if job.digests is not None:
            self._cache.remove(job.tokens[: job.num_seen], job.digests)


def _num_common(first: Sequence[bytes], second: Sequence[bytes]) -> int:
    """Return how many blocks two sequences have in common at their start."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[middle - 1] == second[middle - 1] else (low, middle - 1)
    return low
