"""The next tokens of requests, which the host may read one step behind the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from serve.cache.window_blocks import on_device
from serve.engine.job import Job
from serve.engine.runner import Runner
from serve.engine.step_state import Event, event_on
from serve.sampling.chooser import Choice, TokenChooser
from serve.sampling.sampler import Logprobs, Sampled


@dataclass(eq=False)
class Unread:
    """Tokens that have been sampled, on their way to the host."""

    jobs: list[Job]
    sampled: Sampled
    """The jobs' tokens on the host, once `copied`."""
    copied: Event


class NextTokens:
    """Chooses the next tokens of jobs.

    Where the host overlaps with the device, tokens are sampled and stay on the device for the next
    step, and are read when that has been launched. Constraints need the token before, so jobs with
    one make the host wait.

    Args:
        chooser: Chooses tokens of requests.
        runner: Remembers the tokens that are not read yet.
        overlaps: Read tokens later.
        take: Called with each job and its next token. It may end the job.
    """

    def __init__(
        self,
        chooser: TokenChooser,
        runner: Runner,
        overlaps: bool,
        take: Callable[[Job, Choice], None],
    ) -> None:
        self._chooser, self._runner, self._overlaps = chooser, runner, overlaps
        self._take = take
        self._unread: list[Unread] = []

    @property
    def unread(self) -> list[Unread]:
        """Tokens that have not been read, the earliest first."""
        return list(self._unread)

    def join(self, job: Job) -> None:
        """Get ready for a job that has got a row."""
        if self._overlaps:
            self._chooser.join(job.request_id, job.row)

    def leave(self, job: Job) -> None:
        """Forget the row of a job."""
        if self._overlaps:
            self._chooser.leave(job.request_id)

    def choose(self, jobs: Sequence[Job], logits: Tensor) -> None:
        """Choose the next token of each job that needs one, from `logits [len(jobs), vocab_size]`,
        and take it or let it be read later."""
        ids = [job.request_id for job in jobs if job.needs_token]
        ahead = self._overlaps and self._chooser.can_sample(ids)
        if not ahead:
            self.read()  # may end some of them
        places = [place for place, job in enumerate(jobs) if job.needs_token]
        if not places:
            return
        chosen, own = [jobs[place] for place in places], logits
        if len(places) < len(jobs):
            kept = on_device(np.array(places), logits.device)  # a list would be waited for
            own = logits.index_select(0, kept)
        ids = [job.request_id for job in chosen]
        if ahead:
            rows, numbers, features = self._chooser.begin_rows(ids)
            sampled = self._runner.sample(own, rows, numbers, features)
            if sampled is None:
                on_rows, sampled = self._chooser.sample(own, rows, numbers, features)
                self._runner.set_tokens(on_rows, sampled.tokens)
            # On CUDA these copies are pinned. The next step may overwrite their sources.
            copied = _each(sampled, lambda tensor: tensor.to("cpu", non_blocking=True, copy=True))
            self._unread.append(Unread(chosen, copied, event_on(logits.device)))
            for job in chosen:
                job.num_unread += 1
        else:
            for job, choice in zip(chosen, self._chooser.choose(ids, own), strict=True):
                self._take(job, choice)

    def read(self, unread: Sequence[Unread] | None = None) -> None:
        """Wait for tokens and take them, except those of jobs that have ended. unread: Tokens, some
        of which may have been read meanwhile; None: all."""
        for tokens in list(self._unread):
            if unread is not None and tokens not in unread:
                continue
            self._unread.remove(tokens)
            tokens.copied.synchronize()
            places = [place for place, job in enumerate(tokens.jobs) if not job.has_ended]
            jobs, sampled = [tokens.jobs[place] for place in places], tokens.sampled
            if len(places) < len(tokens.jobs):
                kept = torch.tensor(places, dtype=torch.int64)
                sampled = _each(sampled, partial(torch.index_select, dim=0, index=kept))
            choices = self._chooser.read([job.request_id for job in jobs], sampled)
            for job, choice in zip(jobs, choices, strict=True):
                job.num_unread -= 1
                self._take(job, choice)

    def read_of(self, request_id: int) -> None:
        """Read all tokens, if one is of this request."""
        if any(job.request_id == request_id for tokens in self._unread for job in tokens.jobs):
            self.read()


def _each(sampled: Sampled, function: Callable[[Tensor], Tensor]) -> Sampled:
    """Return `sampled` with the result of a function for each tensor."""
    logprobs = sampled.logprobs
    return Sampled(
        function(sampled.tokens),
        function(sampled.is_finite),
        function(sampled.is_allowed),
        None if logprobs is None else Logprobs(*map(function, logprobs)),
    )
