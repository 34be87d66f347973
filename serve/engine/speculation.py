"""Speculation: guesses of next tokens, several of which a step may confirm.

The token of each place is chosen as always, by the request's settings, its text so far and the
random number of its position. A guess is right if it is that token, and only then does the step
decide about the next place too. So a guess has the probability of its token to be accepted, another
token is drawn from the rest of the distribution, and neither the distribution nor, but for
rounding, the tokens depend on the guesses (Leviathan et al. 2022, arXiv:2211.17192, for guesses
that are certain).
"""

from collections.abc import Callable, Sequence

import torch

from serve.engine.draft_step import DraftStep
from serve.engine.job import Job
from serve.engine.stats import SpeculationCounts
from serve.sampling.chooser import Choice, TokenChooser
from serve.sampling.ngrams import Ngrams

MOST_ROWS, MOST_TOKENS = 4, 16
"""Rows with which a step guesses, and tokens that it takes, at most: more take longer than steps of
a token of each row."""


class Speculation:
    """Guesses and confirms tokens of the running jobs.

    Args:
        step: Takes several tokens of a row. None: nothing is guessed.
        most_drafts: Most tokens that are guessed of a job.
        chooser: Chooses tokens of requests.
        take: Called with each job and its next token. It may end the job.
    """

    def __init__(
        self,
        step: DraftStep | None,
        most_drafts: int,
        chooser: TokenChooser,
        take: Callable[[Job, Choice], None],
    ) -> None:
        self._step, self._chooser, self._take = step, chooser, take
        self._most_drafts = most_drafts
        self.counts = SpeculationCounts()

    def decode(self, jobs: Sequence[Job]) -> bool:
        """Run a step of all jobs of the batch, in the order of their rows, if there is a guess for
        one of them; return whether there is."""
        if self._step is None or not 0 < len(jobs) <= MOST_ROWS:
            return False
        most = min(self._most_drafts, MOST_TOKENS // len(jobs) - 1)
        guesses = [self._guess(self._step, job, most) for job in jobs]
        if not any(guesses):
            return False
        self._confirm(self._step, jobs, guesses)
        return True

    def settle(self, job: Job) -> None:
        """Let caches forget wrong guesses of `job`, which leaves the batch, maybe within a step."""
        if self._step is not None:
            self._step.settle(job.row)

    def _confirm(
        self, step: DraftStep, jobs: Sequence[Job], guesses: Sequence[Sequence[int]]
    ) -> None:
        """Run a step of all jobs, and take their tokens up to the first that was not guessed."""
        tokens = [[_next_token(job), *guess] for job, guess in zip(jobs, guesses, strict=True)]
        logits = step.run([job.row for job in jobs], tokens)
        for job in jobs:
            job.see()
        num_right = [0] * len(jobs)
        places, ahead = [place for place, job in enumerate(jobs) if job.needs_token], 0
        while places:
            ids = [jobs[place].request_id for place in places]
            own = torch.stack([logits[place][ahead] for place in places])
            going_on = []
            for place, choice in zip(places, self._chooser.choose(ids, own), strict=True):
                job, guess = jobs[place], guesses[place]
                is_right = not choice.error and choice.token in guess[ahead : ahead + 1]
                self._take(job, choice)
                num_right[place] += is_right
                if is_right and not job.has_ended:
                    step.accept(job.row)
                    job.see()
                    going_on.append(place)
            places, ahead = going_on, ahead + 1
        step.finish()
        for job, guess, right in zip(jobs, guesses, num_right, strict=True):
            if guess:
                assert job.ngrams is not None
                job.ngrams.learn(right)
                self.counts.add(len(guess), right)

    def _guess(self, step: DraftStep, job: Job, most: int) -> list[int]:
        """Return guesses of what follows the next token of `job`, which is the last it has."""
        if len(job.new_token_ids) != job.num_new_seen + 1:
            return []  # it decodes tokens again, which it had before it was preempted
        if job.ngrams is None:
            job.ngrams = Ngrams(job.tokens)
        job.ngrams.append(job.new_token_ids[len(job.ngrams) - len(job.request.prompt_token_ids) :])
        limit = step.most_tokens(job.row) or most + 1
        most = min(most, limit - 1, job.steps_left - 1, job.steps_to_come - 1)
        return self._chooser.possible(job.request_id, job.ngrams.guess(most))


def _next_token(job: Job) -> int:
    token = job.next_token
    assert token is not None, "tokens have been read before they are guessed"
    return token
