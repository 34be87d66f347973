"""The engine, which takes requests and generates their tokens one step at a time."""

import bisect
import itertools
import time
from typing import Any

from torch import Tensor

from serve.cache.budget import make_caches
from serve.cache.paged_futurefill import PagedFutureFill
from serve.config import EngineConfig
from serve.engine.job import Job
from serve.engine.prefill import ChunkEnd, Prefill
from serve.engine.prefixes import Prefixes
from serve.engine.prompt_results import PromptResults
from serve.engine.runner import Runner
from serve.engine.scheduler import Scheduler
from serve.engine.stats import Stats
from serve.request import FinishReason, Output, Request, TokenLogprobs, check_request
from serve.sampling.chooser import NOT_FINITE, TokenChooser
from serve.sampling.detokenizer import TextStream
from serve.sampling_params import Constraint
from stu.common.errors import UserError
from stu.model import FlashSTU
from stu.tokenizer import Tokenizer


class Engine:
    """Decodes many requests together, synchronously and in one thread.

    Each step prefills a piece of the waiting prompts and generates one token for every running
    request. The same calls in the same order give the same outputs, and a request's tokens do not
    depend on the other requests.

    Args:
        model: On the device that decodes.
        tokenizer: The tokenizer that the model was trained with.
        config: Cache size and limits.
        static: As of `Runner`; for tests.

    Raises UserError if the tokenizer does not fit the model, or the cache has no room for any
    request.
    """

    def __init__(
        self,
        model: FlashSTU,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        static: bool | None = None,
    ) -> None:
        config = config or EngineConfig()
        if tokenizer.vocab_size != model.config.vocab_size:
            raise UserError(
                "tokenizer",
                message=f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
                f"vocab_size={model.config.vocab_size}: give the model's own tokenizer",
            )
        self._model_config, self._tokenizer, self._config = model.config, tokenizer, config
        self._caches = make_caches(model, config)
        self._runner = Runner(model, self._caches, config, static)
        self._prefixes = Prefixes(self._caches, config)
        self._scheduler = Scheduler(
            config, self._caches.needed, self._caches.capacity, self._caches.grow, self._prefixes
        )
        self._texts: dict[int, TextStream] = {}
        self._chooser = TokenChooser(tokenizer, model.embedding.weight.device)
        self._prompt_results = PromptResults()
        self._prefill: Prefill | None = None
        self._aborted: list[Output] = []
        """Last outputs of aborted requests, until the next step returns them."""
        self.scheduled: dict[int, float] = {}
        """Requests whose prefill began in the last step, and when, by the monotonic clock."""
        self._next_id = itertools.count()
        self._prompt_tokens = self._new_tokens = self._steps = 0

    @property
    def has_work(self) -> bool:
        """Whether there are requests that have not ended, or outputs to return."""
        scheduler = self._scheduler
        return bool(scheduler.running or scheduler.waiting or scheduler.prefilling or self._aborted)

    def compile(self, constraint: Constraint) -> None:
        """Compile `constraint`, so that `add` takes no time for it. Another thread may do this.

        Raises UserError for a constraint that is not allowed.
        """
        self._chooser.compile(constraint)

    def add(self, request: Request) -> int:
        """Queue a request and return its id. Raises UserError if it can never be decoded."""
        check_request(request, self._model_config)
        if request.sampling.n != 1:
            raise UserError("n", request.sampling.n, "1", "add a request for each completion")
        return self.add_checked(request)

    def add_checked(self, request: Request) -> int:
        """Queue a request of one completion that `check_request` allows, and return its id. Raises
        UserError if the cache never has room for it, or for a constraint that is not allowed."""
        request_id = next(self._next_id)
        self._chooser.add(request_id, request)
        try:
            self._scheduler.add(request_id, request)
        except UserError:
            self._chooser.remove(request_id)
            raise
        text = TextStream(
            self._tokenizer,
            request.prompt_token_ids,
            request.sampling.stop,
            request.sampling.min_new_tokens,
        )
        self._texts[request_id] = text
        for token in request.new_token_ids:
            text.append(token)
        return request_id

    def abort(self, request_id: int) -> None:
        """End a request; the next step returns its last output. Ignored if it has ended."""
        for job in self._scheduler.jobs:
            if job.request_id == request_id:
                held = self._texts[request_id].finish()
                self._aborted.append(self._finish(job, "abort", held))

    def step(self) -> list[Output]:
        """Run one step and return the outputs of the requests that it advanced."""
        outputs, self._aborted = self._aborted, []
        self.scheduled.clear()
        self._steps += 1
        if self._prefill is None:
            self._begin_prefill()
        outputs += self._decode()
        return outputs + self._continue_prefill()

    def stats(self) -> Stats:
        """Return the load of the engine and its counts."""
        capacity, used = self._caches.capacity, self._caches.used
        convolution = self._caches.convolution
        return Stats(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running) + len(self._scheduler.prefilling),
            convolution_pages=capacity.convolution,
            convolution_pages_used=used.convolution,
            attention_pages=capacity.attention,
            attention_pages_used=used.attention,
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
            preemptions=self._scheduler.num_preemptions,
            steps=self._steps,
            prefix_tokens_asked=self._prefixes.tokens_asked,
            prefix_tokens_found=self._prefixes.tokens_found,
            flushes=dict(convolution.flushes) if isinstance(convolution, PagedFutureFill) else {},
            convolution_cache=self._caches.convolution_info,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if a page is lost, has two owners, or belongs to no request."""
        self._prefixes.check_integrity()
        rows = [job.row for job in self._scheduler.prefilling + self._scheduler.running]
        assert len(set(rows)) == len(rows), "two requests have the same row"
        for cache in self._caches.all:
            cache.check_integrity(rows)

    def _begin_prefill(self) -> None:
        group = self._scheduler.next_group(self._caches.free, self._caches.owned, self._preempt)
        if not group:
            return
        for job in group:
            prompt_tokens, job.steps_left = self._scheduler.size(job)
            job.row = self._runner.admit(prompt_tokens, job.steps_left)
        self._prefixes.make_room()
        prompts = [self._prefixes.begin(job, self._scheduler.prompt(job)) for job in group]
        self.scheduled = dict.fromkeys((job.request_id for job in group), time.monotonic())
        at_once = self._config.prompt_tokens_per_step
        self._prefill = Prefill(self._runner, prompts, at_once, self._prefixes.chunk_len)
        self._prompt_tokens += self._prefill.num_tokens

    def _continue_prefill(self) -> list[Output]:
        """Prefill as many tokens as a step may."""
        for piece in self._prefill.step() if self._prefill is not None else ():
            if isinstance(piece, Tensor):
                return self._end_prefill(piece)
            (job,) = (job for job in self._scheduler.prefilling if job.row == piece.row)
            if isinstance(piece, ChunkEnd):
                self._prefixes.reached(job, piece.num_tokens)
            else:
                self._prompt_results.add(job.request_id, job.request, piece)
        return []

    def _end_prefill(self, logits: Tensor) -> list[Output]:
        """Make rows of the prefilled jobs, and choose their first tokens.

        logits: `[len(prefilling), vocab_size]`.
        """
        jobs = list(self._scheduler.prefilling)
        self._scheduler.prefilling.clear()
        self._prefill = None
        for job in jobs:
            job.num_seen = self._scheduler.size(job)[0]
            self._runner.join(job.row, job.num_seen)
            bisect.insort(self._scheduler.running, job, key=lambda other: other.row)
        ended = [self._finish_prompt(job) for job in jobs if job.steps_to_come == 0]
        rows = [row for row, job in enumerate(jobs) if job.steps_to_come > 0]
        continued = logits[rows] if ended else logits
        return ended + self._choose([jobs[row] for row in rows], continued)

    def _finish_prompt(self, job: Job) -> Output:
        """End a job that generates nothing."""
        if self._prompt_results.are_finite(job.request_id):
            return self._finish(job, "length")
        return self._finish(job, "error", error=NOT_FINITE)

    def _decode(self) -> list[Output]:
        rows = set(self._runner.batch())
        jobs = [job for job in self._scheduler.running if job.row in rows]
        if not jobs:
            return []
        tokens = [job.new_token_ids[job.num_new_seen] for job in jobs]
        logits = self._runner.decode(tokens)
        for job in jobs:
            job.steps_left -= 1
            job.num_seen += 1
        return self._choose(jobs, logits)

    def _choose(self, jobs: list[Job], logits: Tensor) -> list[Output]:
        """Append the next token of each job, from its row of `logits [len(jobs), vocab_size]`."""
        rows = [i for i, job in enumerate(jobs) if job.num_new_seen == len(job.new_token_ids)]
        chosen = [jobs[row] for row in rows]
        outputs = []
        if chosen:
            own = logits if len(rows) == len(jobs) else logits[rows]
            choices = self._chooser.choose([job.request_id for job in chosen], own)
            for job, choice in zip(chosen, choices, strict=True):
                if choice.error:
                    held = self._texts[job.request_id].finish()
                    why = {"error": choice.error, "is_refused": choice.is_refused}
                    outputs.append(self._finish(job, "error", held, **why))
                else:
                    outputs.append(self._append(job, choice.token, choice.logprobs))
        for job in jobs:
            if job.steps_left == 0 and job in self._scheduler.running:
                self._remove_row(job)
                self._scheduler.extend(job)
        return outputs

    def _append(self, job: Job, token: int, logprobs: TokenLogprobs | None) -> Output:
        """Append a new token to `job`."""
        params, text = job.request.sampling, self._texts[job.request_id]
        new: dict[str, Any] = {
            "new_token_ids": [token],
            "logprobs": [] if logprobs is None else [logprobs],
        }
        job.new_token_ids.append(token)
        self._chooser.append(job.request_id, token)
        self._new_tokens += 1
        if token in params.stop_ids(self._tokenizer.eos_id):
            return self._finish(job, "stop", text.finish(), ends_with_stop_token=True, **new)
        new_text = text.append(token)
        if text.stopped:
            return self._finish(job, "stop", new_text, **new)
        if job.steps_to_come == 0:
            return self._finish(job, "length", new_text + text.finish(), **new)
        new |= self._prompt_results.pop(job.request_id, job.request)
        return Output(job.request_id, text=new_text, cached_tokens=job.cached_tokens or 0, **new)

    def _finish(self, job: Job, reason: FinishReason, text: str = "", **values: Any) -> Output:
        """End `job` in any state, free its pages, and return its last output.

        values: Other fields of `Output`.
        """
        if job in self._scheduler.running:
            self._remove_row(job, keeps=reason != "error")
        elif job in self._scheduler.prefilling:
            # Of several, only after a fault: they are prefilled within one step.
            self._scheduler.prefilling.remove(job)
            self._runner.release(job.row)
            if not self._scheduler.prefilling:
                self._prefill = None
        else:
            self._scheduler.waiting.remove(job)
        del self._texts[job.request_id]
        self._chooser.remove(job.request_id)
        values |= self._prompt_results.pop(job.request_id, job.request)
        values["cached_tokens"] = job.cached_tokens or 0
        return Output(job.request_id, text=text, finish_reason=reason, **values)

    def _preempt(self, job: Job) -> None:
        self._remove_row(job)
        self._scheduler.preempt(job)

    def _remove_row(self, job: Job, keeps: bool = True) -> None:
        if keeps:
            self._prefixes.keep(job)
        self._scheduler.running.remove(job)
        self._runner.leave(job.row)
        self._runner.release(job.row)
        self._prefixes.make_room()  # once its own pages are free
