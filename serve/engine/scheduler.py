"""Continuous batching: which requests run, which wait, and who must give way.

Requests go in the order of their priority, then in turn by client, and those of a client in the
order of their arrival; none overtakes one that waits for pages. A request that needs pages or a row
takes them from running requests of less priority, or of a client that has two rows more than its
own, if that is enough: they are preempted, and prefilled again later with the tokens they have.
"""

import bisect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serve.cache.page_pool import Pages
from serve.config import EngineConfig
from serve.engine.runner import Prompt
from serve.request import Request
from stu.common.errors import UserError

SCORED_TOKEN_COST = 4
"""Prompt tokens that are prefilled in about the time of one whose log probability is asked for."""


def prefill_cost(request: Request) -> int:
    """Return how many usual prompt tokens take as long as one of this request."""
    return 1 if request.sampling.prompt_logprobs is None else SCORED_TOKEN_COST


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
    def num_tokens(self) -> int:
        """Tokens that it has, its prompt's included: those to prefill again if it is preempted."""
        return len(self.request.prompt_token_ids) + len(self.tokens)

    @property
    def steps_to_come(self) -> int:
        """New tokens that it may still get."""
        return self.request.sampling.max_new_tokens - len(self.tokens)

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
        self._turns: dict[str, int] = {}
        """Places of clients that have requests waiting: the lowest goes first. A client that comes
        goes before the one that had the last turn, and behind all others; if it went before them
        too, clients that come and go could keep them waiting for ever."""
        self._turn = 0
        """The place of a client that comes now."""

    @property
    def jobs(self) -> list[Job]:
        """All that have not ended."""
        return [*self.waiting, *self.prefilling, *self.running]

    def add(self, request_id: int, request: Request) -> None:
        """Queue a request. Raises UserError if it needs more pages than there are."""
        needed = self._needed(
            len(request.prompt_token_ids), max(0, request.sampling.max_new_tokens - 1)
        )
        for kind in Pages._fields:
            count, most = getattr(needed, kind), getattr(self._capacity, kind)
            if count > most:
                raise UserError(
                    "max_new_tokens",
                    message=f"a prompt of {len(request.prompt_token_ids)} tokens and "
                    f"{request.sampling.max_new_tokens} new tokens need {count} {kind} pages of "
                    f"{self._config.page_len} positions, and the cache has {most}: lower the limit "
                    "of new tokens, or raise cache_gib",
                )
        expected = self._config.expected_new_tokens
        horizon = request.sampling.max_new_tokens if expected is None else expected
        self._queue(Job(request_id, request, horizon, list(request.new_token_ids)))

    def prompt(self, job: Job) -> Prompt:
        """What `job` is to be taken in with."""
        _, new_tokens = self._size(job)
        given = job.tokens[: self.num_given(job)]
        asks = job.request.sampling.prompt_logprobs is not None and not job.tokens
        return Prompt(job.request_id, [*job.request.prompt_token_ids, *given], new_tokens, asks)

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
        cost, taken = 0, Pages(0, 0)
        while self.waiting:
            job = self._first([*self.running, *group])
            prompt_tokens, new_tokens = self._size(job)
            cost += prompt_tokens * prefill_cost(job.request)
            too_many = cost > self._config.prompt_tokens_per_step
            if group and (too_many or self._config.batch_invariant):
                break
            needed = _add(taken, self._needed(prompt_tokens, new_tokens))
            victims = self._victims(job, needed, group, free(), owned)
            if victims is None:
                break
            for victim in victims:
                set_back(victim)
            self.waiting.remove(job)
            self._took_turn(job)
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
        to_come = max(0, job.request.sampling.max_new_tokens - num_given - 1)
        return len(job.request.prompt_token_ids) + num_given, min(to_come, job.horizon)

    def _queue(self, job: Job) -> None:
        bisect.insort(self.waiting, job, key=lambda its: its.order)
        self._turns.setdefault(job.request.client, self._turn)

    def _first(self, has_rows: Sequence[Job]) -> Job:
        """Return the job that goes next: one of the client with the fewest rows."""
        rows = Counter(job.request.client for job in has_rows)
        first = self.waiting[0]
        same = (job for job in self.waiting if job.request.priority == first.request.priority)

        def turn(job: Job) -> tuple[int, int, tuple[int, int]]:
            client = job.request.client
            return rows[client], self._turns[client], job.order

        return min(same, key=turn)

    def _took_turn(self, job: Job) -> None:
        """Let clients that have as few rows as that of `job` go before it the next time."""
        waiting = {other.request.client for other in self.waiting}
        self._turn += 2
        self._turns[job.request.client] = self._turn + 1
        self._turns = {client: turn for client, turn in self._turns.items() if client in waiting}

    def _victims(
        self,
        job: Job,
        needed: Pages,
        group: Sequence[Job],
        free: Pages,
        owned: Callable[[int], Pages],
    ) -> list[Job] | None:
        """Running jobs that must give way before `job` fits; None if that does not help."""
        num_rows = self._config.max_running - len(self.running) - len(group)
        rows = Counter(other.request.client for other in [*self.running, *group])
        candidates, victims = list(self.running), list[Job]()
        while (
            num_rows < 1
            or needed.convolution > free.convolution
            or needed.attention > free.attention
        ):
            victim = self._victim(job, candidates, rows)
            if victim is None:
                return None
            candidates.remove(victim)
            victims.append(victim)
            rows[victim.request.client] -= 1
            num_rows, free = num_rows + 1, _add(free, owned(victim.request_id))
        return victims

    def _victim(self, job: Job, candidates: Sequence[Job], rows: Counter[str]) -> Job | None:
        """Return the candidate that gives way to `job` first, if one has to."""
        lesser = [other for other in candidates if other.request.priority > job.request.priority]
        if lesser:
            return max(lesser, key=lambda other: other.order)
        # Prefilling a token again takes about as long as a row of a decoding step: preempting costs
        # less than waiting until a row is free, or it is not done.
        steps = min((other.steps_to_come for other in self.running), default=0)
        own = rows[job.request.client]
        richer = [
            other
            for other in candidates
            if other.request.priority == job.request.priority
            and rows[other.request.client] > own + 1
            and other.num_tokens < steps * self._config.max_running
        ]
        if not richer:
            return None
        return min(
            richer,
            key=lambda other: (-rows[other.request.client], other.num_tokens, -other.request_id),
        )


def _add(one: Pages, other: Pages) -> Pages:
    return Pages(one.convolution + other.convolution, one.attention + other.attention)
