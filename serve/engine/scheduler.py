"""Continuous batching: decides which requests run, which wait and which are preempted.

Requests are scheduled by priority, then by client in turn, and those of a client in the order of
their arrival. None overtakes a request that waits for pages; one whose prompt begins like that of
another, which is next to be prefilled, waits for the prefix that this one leaves. A request that
needs pages or a row preempts running requests of lower priority, or of a client that has at least
two rows more than its own, if that is enough. A preempted request is prefilled again later, with
the tokens it has.
"""

import bisect
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

from serve.cache.page_pool import Pages
from serve.config import EngineConfig
from serve.engine.job import Job
from serve.engine.prefill import Prompt
from serve.engine.prefixes import Prefixes
from serve.request import Request
from stu.common.errors import UserError, setting_name


class Scheduler:
    """The queue of an engine.

    Args:
        config: Limits.
        needed: Returns the pages for a number of prompt tokens and a number of new tokens.
        capacity: Pages that there are.
        cache_grows: Whether a sequence needs more pages for more new tokens without end.
        prefixes: What is remembered of prompts.
    """

    def __init__(
        self,
        config: EngineConfig,
        needed: Callable[[int, int], Pages],
        capacity: Pages,
        cache_grows: bool,
        prefixes: Prefixes,
    ) -> None:
        self._config, self._needed, self._capacity = config, needed, capacity
        self._cache_grows, self._prefixes = cache_grows, prefixes
        self.waiting: list[Job] = []
        """Jobs in the queue, in the order of `Job.order`."""
        self._num_waiting = Counter[str]()
        """Number of them of each client that has any."""
        self.prefilling: list[Job] = []
        self.running: list[Job] = []
        """Jobs in the order of their rows."""
        self.num_preemptions = 0
        self._turns: dict[str, int] = {}
        """Turns of clients that have requests waiting; the lowest is next. A new client's turn is
        before that of the client served last and after all others: if it were before those too,
        clients that come and go could keep them waiting for ever."""
        self._turn = 0
        """Turn of the next new client."""

    def find(self, request_id: int) -> Job | None:
        """Return the job of a request, or None if it has ended."""
        jobs = chain(self.running, self.prefilling, self.waiting)
        return next((job for job in jobs if job.request_id == request_id), None)

    def add(self, request_id: int, request: Request) -> None:
        """Queue a request. Raises UserError if it needs more pages than there are."""
        max_new_tokens = request.sampling.max_new_tokens
        needed = self._needed(len(request.prompt_token_ids), max(0, max_new_tokens - 1))
        for kind in Pages._fields:
            count, most = getattr(needed, kind), getattr(self._capacity, kind)
            if count > most:
                raise UserError(
                    "max_new_tokens",
                    message=f"a prompt of {len(request.prompt_token_ids)} tokens and "
                    f"{max_new_tokens} new tokens need {count} {kind} pages of "
                    f"{self._config.page_len} positions, and the cache has {most}: lower the limit "
                    f"of new tokens, or raise {setting_name('cache_gib')}",
                )
        expected = self._config.expected_new_tokens if self._cache_grows else None
        horizon = max_new_tokens if expected is None else expected
        job = Job(request_id, request, horizon, list(request.new_token_ids))
        self._prefixes.add(job)
        self._queue(job)

    def prompt(self, job: Job) -> Prompt:
        """Return what to prefill for `job`, which has a row."""
        tokens = [*job.request.prompt_token_ids, *job.new_token_ids[: self.num_prefilled(job)]]
        logits_from = None if job.new_token_ids else job.logprobs_from
        pooling, cost = job.request.pooling, job.token_cost
        return Prompt(job.row, tokens, logits_from=logits_from, pooling=pooling, cost=cost)

    def num_prefilled(self, job: Job) -> int:
        """Return how many of its new tokens are prefilled together with its prompt."""
        return 0 if self._config.batch_invariant else len(job.new_token_ids)

    def next_group(
        self,
        free: Callable[[], Pages],
        owned: Callable[[int], Pages],
        preempt: Callable[[Job], None],
    ) -> list[Job]:
        """Move the jobs to prefill next from waiting to prefilling, and return them.

        Args:
            free: Returns the pages that are neither owned nor promised.
            owned: Returns the pages of a row, which become free if it is preempted.
            preempt: Takes a running job's row and pages, and calls `Scheduler.preempt`.
        """
        group: list[Job] = []
        aside: list[Job] = []
        cost, taken = 0, Pages(0, 0)
        while len(aside) < self._config.max_running:
            job = self._first([*self.running, *group], aside)
            if job is None:
                break
            prompt_tokens, new_tokens = self.size(job)
            needed = _add(taken, self._needed(prompt_tokens, new_tokens))
            victims = self._victims(job, needed, group, free(), owned)
            if victims is None:
                break
            num_found = self._prefixes.num_found(job, prompt_tokens)
            if self._prefixes.waits_for(job, group, num_found):
                aside.append(job)
                continue
            cost += (prompt_tokens - num_found) * job.token_cost
            too_many = cost > self._config.prompt_tokens_per_step
            if group and (too_many or self._config.batch_invariant):
                break
            for victim in victims:
                preempt(victim)
            self.remove(job)
            self._took_turn(job)
            group.append(job)
            taken = needed
        self.prefilling.extend(group)
        return group

    def remove(self, job: Job) -> bool:
        """Take a job out of the queue, and return whether it was there."""
        place = bisect.bisect_left(self.waiting, job.order, key=lambda other: other.order)
        if self.waiting[place : place + 1] != [job]:
            return False
        del self.waiting[place]
        client = job.request.client
        self._num_waiting[client] -= 1
        if not self._num_waiting[client]:
            del self._num_waiting[client], self._turns[client]
        return True

    def preempt(self, job: Job) -> None:
        """Put a job that was running back into the queue."""
        self.num_preemptions += 1
        self._queue(job)

    def extend(self, job: Job) -> None:
        """Preempt a job that used up its pages; it is prefilled again with twice as many."""
        job.horizon *= 2
        self.preempt(job)

    def size(self, job: Job) -> tuple[int, int]:
        """Return how many tokens to prefill, and for how many new ones `job` gets pages."""
        num_prefilled = self.num_prefilled(job)
        to_come = max(0, job.request.sampling.max_new_tokens - num_prefilled - 1)
        return len(job.request.prompt_token_ids) + num_prefilled, min(to_come, job.horizon)

    def _queue(self, job: Job) -> None:
        bisect.insort(self.waiting, job, key=lambda other: other.order)
        self._num_waiting[job.request.client] += 1
        self._turns.setdefault(job.request.client, self._turn)

    def _first(self, has_rows: Sequence[Job], aside: Sequence[Job] = ()) -> Job | None:
        """Return the job to schedule next: one of the client with the fewest rows, of the highest
        priority that waits, and not one of `aside`."""
        rows = Counter(job.request.client for job in has_rows)
        firsts: dict[str, Job] = {}  # of each client
        for job in self.waiting:  # there may be many thousands
            is_lower = job.request.priority != self.waiting[0].request.priority
            if is_lower or len(firsts) == len(self._num_waiting):
                break
            if job not in aside:
                firsts.setdefault(job.request.client, job)

        def turn(job: Job) -> tuple[int, int]:
            return rows[job.request.client], self._turns[job.request.client]

        return min(firsts.values(), key=turn, default=None)

    def _took_turn(self, job: Job) -> None:
        """Move the client of `job` behind the clients that have as few rows."""
        self._turn += 2
        if job.request.client in self._turns:
            self._turns[job.request.client] = self._turn + 1

    def _victims(
        self,
        job: Job,
        needed: Pages,
        group: Sequence[Job],
        free: Pages,
        owned: Callable[[int], Pages],
    ) -> list[Job] | None:
        """Return the running jobs to preempt before `job` fits; None if that does not help."""
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
            num_rows, free = num_rows + 1, _add(free, owned(victim.row))
        return victims

    def _victim(self, job: Job, candidates: Sequence[Job], rows: Counter[str]) -> Job | None:
        """Return the candidate to preempt first for `job`, or None."""
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


def _add(pages: Pages, more: Pages) -> Pages:
    return Pages(pages.convolution + more.convolution, pages.attention + more.attention)
