"""Continuous batching: which requests run, which wait, and who must give way.

Requests go in the order of their priority and then of their arrival, and none overtakes one that
waits for pages. A request that needs pages or a row takes them from running requests of less
priority, if that is enough: they are set back, and taken in again later with the tokens they have.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

from serve.config import EngineConfig
from serve.request import Request
from serve.runner import Pages, Prompt


@dataclass(eq=False)
class Job:
    """A request on its way."""

    request_id: int
    request: Request
    horizon: int
    """New tokens it gets pages for at a time."""
    tokens: list[int] = field(default_factory=list)
    """New tokens so far."""
    replayed: int = 0
    """How many of them it has been given since it was last admitted."""
    steps_left: int = 0
    """New tokens that it still has pages to step with."""

    @property
    def order(self) -> tuple[int, int]:
        """Smaller goes first."""
        return self.request.priority, self.request_id


class Scheduler:
    """The queue of an engine. `needed` says how many pages a prompt of so many tokens needs for so
    many new ones, and `capacity` how many there are."""

    def __init__(
        self, config: EngineConfig, needed: Callable[[int, int], Pages], capacity: Pages
    ) -> None:
        self._config, self._needed, self._capacity = config, needed, capacity
        self.waiting: list[Job] = []
        self.prefilling: list[Job] = []
        self.running: list[Job] = []
        """In the order of the batch's rows."""
        self.num_preemptions = 0

    @property
    def jobs(self) -> list[Job]:
        """All that have not ended."""
        return [*self.waiting, *self.prefilling, *self.running]

    def add(self, request_id: int, request: Request) -> None:
        """Queue a request. Raises ValueError if it needs more pages than there are."""
        needed = self._needed(len(request.tokens), max(0, request.max_new_tokens - 1))
        for kind in Pages._fields:
            count, most = getattr(needed, kind), getattr(self._capacity, kind)
            if count > most:
                raise ValueError(
                    f"a prompt of {len(request.tokens)} tokens and max_new_tokens="
                    f"{request.max_new_tokens} need {count} {kind} pages of "
                    f"{self._config.page_len} positions, and the cache has {most}: lower "
                    "max_new_tokens, or raise cache_gib"
                )
        expected = self._config.expected_new_tokens
        horizon = request.max_new_tokens if expected is None else expected
        self._queue(Job(request_id, request, horizon, list(request.given)))

    def prompt(self, job: Job) -> Prompt:
        """What `job` is to be taken in with."""
        _, new_tokens = self._size(job)
        given = job.tokens[: self.num_given(job)]
        asks = job.request.prompt_logprobs is not None and not job.tokens
        return Prompt(job.request_id, [*job.request.tokens, *given], new_tokens, asks)

    def num_given(self, job: Job) -> int:
        """How many of its new tokens are taken in together with its prompt."""
        return 0 if self._config.batch_invariant else len(job.tokens)

    def next_group(
        self,
        free: Callable[[], Pages],
        owned: Callable[[int], Pages],
        set_back: Callable[[Job], None],
    ) -> list[Job]:
        """Move the jobs that are to be taken in next from waiting to prefilling.

        free: pages nobody has been promised. owned: what a running request gives back when
        `set_back`, which must call `preempt`.
        """
        group: list[Job] = []
        num_tokens, taken = 0, Pages(0, 0)
        while self.waiting:
            job = self.waiting[0]
            prompt_tokens, new_tokens = self._size(job)
            num_tokens += prompt_tokens
            too_many = num_tokens > self._config.prompt_tokens_per_step
            if group and (too_many or self._config.batch_invariant):
                break
            needed = _add(taken, self._needed(prompt_tokens, new_tokens))
            victims = self._victims(job, needed, len(group), free(), owned)
            if victims is None:
                break
            for victim in victims:
                set_back(victim)
            assert self.waiting[0] is job, "one that gave way waits before the one it gave way to"
            self.waiting.pop(0)
            group.append(job)
            taken = needed
        self.prefilling.extend(group)
        return group

    def preempt(self, job: Job) -> None:
        """Send a running job back to wait."""
        self.num_preemptions += 1
        self._queue(job)

    def extend(self, job: Job) -> None:
        """Send back a job that used up its pages, to be taken in with twice as many."""
        job.horizon *= 2
        self.preempt(job)

    def _size(self, job: Job) -> tuple[int, int]:
        """Tokens that `job` is to be taken in with, and new ones that it gets pages for."""
        num_given = self.num_given(job)
        to_come = max(0, job.request.max_new_tokens - num_given - 1)
        return len(job.request.tokens) + num_given, min(to_come, job.horizon)

    def _queue(self, job: Job) -> None:
        bisect.insort(self.waiting, job, key=lambda its: its.order)

    def _victims(
        self,
        job: Job,
        needed: Pages,
        num_taken: int,
        free: Pages,
        owned: Callable[[int], Pages],
    ) -> list[Job] | None:
        """Running jobs that must give way before `job` fits, the last in order first; None if that
        does not help."""
        rows = self._config.max_running - len(self.running) - num_taken
        candidates = sorted(self.running, key=lambda its: its.order, reverse=True)
        victims: list[Job] = []
        while (
            rows < 1 or needed.convolution > free.convolution or needed.attention > free.attention
        ):
            if not candidates or candidates[0].request.priority <= job.request.priority:
                return None
            victim = candidates.pop(0)
            victims.append(victim)
            rows, free = rows + 1, _add(free, owned(victim.request_id))
        return victims


def _add(one: Pages, other: Pages) -> Pages:
    return Pages(one.convolution + other.convolution, one.attention + other.attention)
