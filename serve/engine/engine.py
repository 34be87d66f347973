"""The engine, which takes requests and generates their tokens one step at a time."""

import bisect
import itertools
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from serve.adapters.folder import Adapter
from serve.cache.base import num_rows
from serve.cache.budget import make_caches
from serve.config import EngineConfig
from serve.engine.job import Job
from serve.engine.next_tokens import NextTokens
from serve.engine.prefill import ChunkEnd, Prefill
from serve.engine.prefixes import Prefixes
from serve.engine.prompt_results import PromptResults
from serve.engine.runner import Runner
from serve.engine.scheduler import Scheduler
from serve.engine.speculation import Speculation
from serve.engine.stats import Stats
from serve.request import FinishReason, Output, Request, TokenLogprobs, check_request
from serve.sampling.chooser import NOT_FINITE, Choice, TokenChooser
from serve.sampling.detokenizer import TextStream
from serve.sampling_params import Constraint
from stu.common.errors import UserError
from stu.model import FlashSTU
from stu.tokenizer import Tokenizer


class Engine:
    """Decodes many requests together, synchronously and in one thread.

    Each step prefills a chunk of waiting prompts and generates a token of each running request. The
    same calls in the same order give the same outputs; other requests affect only rounding.

    Args:
        model: Model, on the device to decode on.
        tokenizer: The tokenizer that the model was trained with.
        config: Cache size and limits.
        static: Whether decoding steps work on static tensors; for tests. None: only on CUDA.
        adapters: LoRA adapters that requests can name.

    Raises UserError if the tokenizer does not match the model, or the cache is too small for any
    request.
    """

    def __init__(
        self,
        model: FlashSTU,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        static: bool | None = None,
        adapters: Sequence[Adapter] = (),
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
        self._runner = Runner(model, self._caches, config, static, adapters)
        self._prefixes = Prefixes(self._caches, config)
        self._scheduler = Scheduler(
            config, self._caches.needed, self._caches.capacity, self._caches.grow, self._prefixes
        )
        self._texts: dict[int, TextStream] = {}
        self._prompt_results = PromptResults()
        self._prefill: Prefill | None = None
        device, most_tokens = model.embedding.weight.device, model.config.max_seq_len
        self._chooser = TokenChooser(tokenizer, device, num_rows(config), most_tokens)
        overlaps = device.type == "cuda" if config.overlap is None else config.overlap
        if overlaps:
            self._runner.capture_sampling(self._chooser.sampler)
        self._next_tokens = NextTokens(self._chooser, self._runner, overlaps, self._take)
        drafts = self._runner.drafts, config.most_drafts
        self._speculation = Speculation(*drafts, self._chooser, self._take)
        self._outputs: list[Output] = []  # for the next step to return
        self.scheduled: dict[int, float] = {}
        """Requests whose prefill began in the last step, with its time on the monotonic clock."""
        self._next_id, self._new_tokens = itertools.count(), 0
        self._steps, self._is_stepping = 0, False

    @property
    def has_work(self) -> bool:
        """Whether there are requests that have not ended, or outputs to return."""
        return bool(self._texts or self._outputs)

    def compile(self, constraint: Constraint) -> None:
        """Compile `constraint` in advance, so that `add` is fast. Another thread may call this.

        Raises UserError for a constraint that is not allowed.
        """
        self._chooser.compile(constraint)

    def add(self, request: Request) -> int:
        """Queue a request and return its id. Raises UserError if it can never be decoded."""
        check_request(request, self._model_config)
        if (count := request.sampling.num_candidates) != 1:
            fix = "add a request for each completion"
            raise UserError("n", count, "1, without best_of", fix)
        return self.add_checked(request)

    def add_checked(self, request: Request) -> int:
        """Queue a request of one completion that `check_request` allows, and return its id. Raises
        UserError if the cache never has room for it, or for a constraint that is not allowed."""
        self._runner.adapters.require(request.adapter)
        request_id = next(self._next_id)
        self._chooser.add(request_id, request)
        try:
            self._scheduler.add(request_id, request)
        except UserError:
            self._chooser.remove(request_id)
            raise
        text = self._texts[request_id] = TextStream.of(self._tokenizer, request)
        for token in request.new_token_ids:
            text.append(token)
        return request_id

    def abort(self, request_id: int) -> None:
        """End a request; the next step returns its last output. Does nothing if it has ended."""
        self._next_tokens.read_of(request_id)
        if (job := self._scheduler.find(request_id)) is not None:
            held = self._texts[request_id].finish()
            self._finish(job, "abort", held)

    def step(self) -> list[Output]:
        """Run one step, and return the outputs of the requests that made progress. Raises
        RuntimeError after a step that raised an exception between layers."""
        if self._is_stepping:
            raise RuntimeError("a step of this engine has failed half done: make another")
        self._is_stepping = True
        self.scheduled.clear()
        self._steps += 1
        self._leave_rows()
        if self._prefill is None:
            self._begin_prefill()
        self._decode()
        self._continue_prefill()
        outputs, self._outputs, self._is_stepping = self._outputs, [], False
        return outputs

    def stats(self) -> Stats:
        """Return the load of the engine and its counts."""
        counts = self._runner.num_prefilled, self._new_tokens, self._steps
        parts = self._scheduler, self._caches, self._prefixes
        return Stats.of(*parts, *counts, self._speculation.counts)

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
            job.row = self._runner.admit(prompt_tokens, job.steps_left, job.request.adapter)
        self._prefixes.make_room()
        prompts = [self._prefixes.begin(job, self._scheduler.prompt(job)) for job in group]
        self.scheduled = dict.fromkeys((job.request_id for job in group), time.monotonic())
        at_once = self._config.prompt_tokens_per_step
        self._prefill = Prefill(self._runner, prompts, at_once, self._prefixes.chunk_len)

    def _continue_prefill(self) -> None:
        """Prefill as many tokens as a step may."""
        for piece in self._prefill.step() if self._prefill is not None else ():
            if isinstance(piece, Tensor):
                self._end_prefill(piece)
                return
            (job,) = (job for job in self._scheduler.prefilling if job.row == piece.row)
            if isinstance(piece, ChunkEnd):
                self._prefixes.reached(job, piece.num_tokens)
            else:
                self._prompt_results.add(job.request_id, job.request, piece)

    def _end_prefill(self, logits: Tensor) -> None:
        """Make rows of the prefilled jobs, and choose their first tokens from their logits
        `[len(prefilling), vocab_size]`."""
        jobs = list(self._scheduler.prefilling)
        self._scheduler.prefilling.clear()
        self._prefill = None
        for job in jobs:
            job.num_seen = self._scheduler.size(job)[0]
            self._runner.join(job.row, job.num_seen)
            self._next_tokens.join(job)
            bisect.insort(self._scheduler.running, job, key=lambda other: other.row)
        for job in jobs:
            if job.steps_to_come == 0:  # it generates nothing
                finite = self._prompt_results.are_finite(job.request_id)
                self._finish(job, *(("length",) if finite else ("error", "", NOT_FINITE)))
        self._next_tokens.choose(jobs, logits)

    def _decode(self) -> None:
        rows = set(self._runner.batch())
        jobs = [job for job in self._scheduler.running if job.row in rows]
        if self._speculation.decode(jobs):
            return
        earlier = self._next_tokens.unread
        if jobs:
            logits = self._runner.decode([job.next_token for job in jobs])
            for job in jobs:
                job.see()
            self._next_tokens.choose(jobs, logits)
        self._next_tokens.read(earlier)

    def _leave_rows(self) -> None:
        """Take the rows of jobs that have no steps left: they get their last tokens without one, or
        more pages."""
        done = [job for job in self._scheduler.running if job.steps_left == 0]
        if any(job.steps_to_come > job.num_unread for job in done):
            self._next_tokens.read()
        for job in done:
            if job in self._scheduler.running:
                self._remove_row(job)
                if job.steps_to_come > job.num_unread:
                    self._scheduler.extend(job)

    def _take(self, job: Job, choice: Choice) -> None:
        """Append the next token to `job`, or end it with an error."""
        if choice.error:
            held = self._texts[job.request_id].finish()
            self._finish(job, "error", held, choice.error, is_refused=choice.is_refused)
        else:
            self._append(job, choice.token, choice.logprobs)

    def _append(self, job: Job, token: int, logprobs: TokenLogprobs | None) -> None:
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
            self._finish(job, "stop", text.finish(), ends_with_stop_token=True, **new)
            return
        new_text = text.append(token)
        if text.stopped:
            self._finish(job, "stop", new_text, **new)
        elif job.steps_to_come == 0:
            self._finish(job, "length", new_text + text.finish(), **new)
        else:
            new |= self._prompt_results.pop(job.request_id, job.request)
            cached_tokens = job.cached_tokens or 0
            output = Output(job.request_id, text=new_text, cached_tokens=cached_tokens, **new)
            self._outputs.append(output)

    def _finish(
        self, job: Job, reason: FinishReason, text: str = "", error: str = "", **values: Any
    ) -> None:
        """End `job` in any state, free its pages, and append its last output.

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
        elif not self._scheduler.remove(job) and reason == "error":  # it left its row before
            self._prefixes.forget(job)
        job.has_ended = True
        del self._texts[job.request_id]
        self._chooser.remove(job.request_id)
        values |= self._prompt_results.pop(job.request_id, job.request)
        values["cached_tokens"] = job.cached_tokens or 0
        output = Output(job.request_id, text=text, finish_reason=reason, error=error, **values)
        self._outputs.append(output)

    def _preempt(self, job: Job) -> None:
        self._next_tokens.read()
        if job in self._scheduler.running:  # it has not just ended
            self._remove_row(job)
            self._scheduler.preempt(job)

    def _remove_row(self, job: Job, keeps: bool = True) -> None:
        self._speculation.settle(job)
        if keeps:
            self._prefixes.keep(job)
        self._scheduler.running.remove(job)
        self._runner.leave(job.row)
        self._next_tokens.leave(job)
        self._runner.release(job.row)
        self._prefixes.make_room()  # once its own pages are free
