"""The engine: requests in, tokens out, one step at a time.

A step takes a piece of the waiting prompts in and gives every running request one token. The same
calls in the same order give the same outputs. Single-threaded; whatever is asynchronous lies
outside.
"""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from serve.cache.budget import make_caches
from serve.config import EngineConfig
from serve.engine.runner import LOGITS_AT_ONCE, PromptLogits, Runner
from serve.engine.scheduler import Job, Scheduler, prefill_cost
from serve.request import FinishReason, Output, Request, TokenLogprobs, check_request
from serve.sampling.chooser import TokenChooser
from serve.sampling.detokenizer import TextStream
from serve.sampling.sampler import token_logprobs
from serve.sampling_params import Constraint
from stu.common.errors import UserError
from stu.model import FlashSTU
from stu.tokenizer import Tokenizer


@dataclass(frozen=True)
class Stats:
    """What an engine is doing, and has done since its start."""

    waiting: int
    """Requests; those whose prompts are being taken in count as running."""
    running: int
    convolution_pages: int
    convolution_pages_used: int
    attention_pages: int
    attention_pages_used: int
    prompt_tokens: int
    """Taken in; again for a request that was set back."""
    new_tokens: int
    preemptions: int
    steps: int
    flushes: Mapping[int, tuple[int, float]] = field(default_factory=dict)
    """Of the convolution: by the positions of a tile, how many steps flushed such, and the seconds
    that took (on a GPU, to start it)."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Stats":
        """From what JSON or msgpack made of `asdict`."""
        flushes = {int(its): tuple(pair) for its, pair in values["flushes"].items()}
        return cls(**{**values, "flushes": flushes})


class Engine:
    """Decodes requests with `model`; raises ValueError if the cache has no room for any."""

    def __init__(
        self, model: FlashSTU, tokenizer: Tokenizer, config: EngineConfig | None = None
    ) -> None:
        config = config or EngineConfig()
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
                f"vocab_size={model.config.vocab_size}: give the model's own tokenizer"
            )
        self._model_config, self._tokenizer, self._config = model.config, tokenizer, config
        self._caches = make_caches(model, config)
        self._runner = Runner(
            model,
            self._caches.convolution,
            self._caches.attention,
            config.batch_invariant,
            self._caches.recent,
        )
        self._scheduler = Scheduler(config, self._runner.needed, self._caches.capacity)
        self._texts: dict[int, TextStream] = {}
        self._chooser = TokenChooser(tokenizer, model.embedding.weight.device)
        self._prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        """Of prompts that are being taken in, or have just been."""
        self._prefill: Iterator[Tensor | PromptLogits | None] = iter(())
        self._prefill_tokens = 0
        """Of all prompts that are taken in now."""
        self._prefill_cost = 0
        """In prompt tokens whose log probabilities nobody asks for."""
        self._aborted: list[Output] = []
        self.scheduled: dict[int, float] = {}
        """When the last step began prefills, by the ids of the requests and the monotonic clock."""
        self._next_id = itertools.count()
        self._prompt_tokens = self._new_tokens = self._steps = 0

    @property
    def has_work(self) -> bool:
        """Whether another step will do anything."""
        scheduler = self._scheduler
        return bool(scheduler.running or scheduler.waiting or scheduler.prefilling or self._aborted)

    def compile(self, constraint: Constraint) -> None:
        """Get `constraint` ready for `add`, which then takes no time for it; another thread may do
        this. Raises ValueError as `add` will."""
        self._chooser.compile(constraint)

    def add(self, request: Request) -> int:
        """Queue a request and return its number. Raises ValueError if it can never be decoded."""
        check_request(request, self._model_config)
        if request.sampling.n != 1:
            raise UserError("n", request.sampling.n, "1", "add a request for each completion")
        request_id = next(self._next_id)
        self._chooser.add(request_id, request)
        try:
            self._scheduler.add(request_id, request)
        except ValueError:
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
        """End a request now; the next step returns its last output. One that ended stays ended."""
        for job in self._scheduler.jobs:
            if job.request_id == request_id:
                held = self._texts[request_id].finish()
                self._aborted.append(self._finish(job, "abort", held))

    def step(self) -> list[Output]:
        """Go on with every request; what that added to each."""
        outputs, self._aborted = self._aborted, []
        self.scheduled.clear()
        self._steps += 1
        if not self._scheduler.prefilling:
            self._begin_prefill()
        outputs += self._decode()
        outputs += self._go_on_with_prefill()
        return outputs

    def stats(self) -> Stats:
        """Counts as of now."""
        convolution, attention = self._caches.pools
        return Stats(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running) + len(self._scheduler.prefilling),
            convolution_pages=convolution.capacity,
            convolution_pages_used=convolution.num_used,
            attention_pages=attention.capacity if attention else 0,
            attention_pages_used=attention.num_used if attention else 0,
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
            preemptions=self._scheduler.num_preemptions,
            steps=self._steps,
            flushes=dict(self._caches.convolution.flushes),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if a page is lost, or owned by two or by nobody who is here."""
        owners = {job.request_id for job in self._scheduler.prefilling + self._scheduler.running}
        for pool in filter(None, self._caches.pools):
            pool.check_integrity()
            held = sum(len(pool.pages_of(owner)) for owner in owners)
            assert held == pool.num_used, "a page belongs to a request that is not running"

    def _begin_prefill(self) -> None:
        group = self._scheduler.next_group(self._caches.free, self._caches.owned, self._set_back)
        if not group:
            return
        prompts = [self._scheduler.prompt(job) for job in group]
        for job, prompt in zip(group, prompts, strict=True):
            self._runner.admit(prompt)
            job.steps_left = prompt.new_tokens
            job.replayed = self._scheduler.num_given(job)
        self.scheduled = dict.fromkeys((job.request_id for job in group), time.monotonic())
        self._prefill_tokens = sum(len(prompt.tokens) for prompt in prompts)
        self._prefill_cost = sum(
            len(prompt.tokens) * prefill_cost(job.request)
            for job, prompt in zip(group, prompts, strict=True)
        )
        self._prompt_tokens += self._prefill_tokens
        self._prefill = self._runner.prefill(prompts, self._config.prompt_tokens_per_step)

    def _go_on_with_prefill(self) -> list[Output]:
        """As much of the prompts as a step may take in."""
        if not self._scheduler.prefilling:
            return []
        num_tokens = self._prefill_tokens
        at_once = self._config.prompt_tokens_per_step
        pieces_per_layer = 1 + -(-num_tokens // at_once)
        pieces = self._model_config.num_layers * pieces_per_layer
        if self._prefill_cost > num_tokens:
            pieces += -(-num_tokens // LOGITS_AT_ONCE)
        steps = max(1, self._prefill_cost // at_once)
        # What takes one step is taken in to its end, whatever log probabilities it asks for.
        count = -(-(pieces + 1) // steps) if steps > 1 else None
        for logits in itertools.islice(self._prefill, count):
            if isinstance(logits, PromptLogits):
                self._take_prompt_logits(logits)
            elif logits is not None:
                return self._end_prefill(logits)
        return []

    def _take_prompt_logits(self, piece: PromptLogits) -> None:
        (request,) = (
            job.request for job in self._scheduler.prefilling if job.request_id == piece.owner
        )
        tokens = request.prompt_token_ids[piece.first : piece.first + len(piece.logits)]
        counts = [request.sampling.prompt_logprobs] * len(tokens)
        found = token_logprobs(piece.logits, tokens, counts)
        kept = self._prompt_logprobs.setdefault(piece.owner, [])
        kept += [its for its in found if its is not None]

    def _end_prefill(self, logits: Tensor) -> list[Output]:
        jobs = list(self._scheduler.prefilling)
        self._scheduler.prefilling.clear()
        self._forget_prefill()
        for job in jobs:
            self._runner.join(job.request_id)
        self._scheduler.running.extend(jobs)
        ended = [
            self._finish(job, "length") for job in jobs if job.request.sampling.max_new_tokens == 0
        ]
        rows = [row for row, job in enumerate(jobs) if job.request.sampling.max_new_tokens > 0]
        going_on = logits[rows] if ended else logits
        return ended + self._choose([jobs[row] for row in rows], going_on)

    def _forget_prefill(self) -> None:
        """And with it the prompts' activations."""
        self._prefill = iter(())

    def _decode(self) -> list[Output]:
        jobs = list(self._scheduler.running)
        if not jobs:
            return []
        logits = self._runner.decode([job.tokens[job.replayed - 1] for job in jobs])
        for job in jobs:
            job.steps_left -= 1
        return self._choose(jobs, logits)

    def _choose(self, jobs: list[Job], logits: Tensor) -> list[Output]:
        """Each running job's next token, from its row of `logits [len(jobs), vocab_size]`."""
        rows = []
        for row, job in enumerate(jobs):
            if job.replayed < len(job.tokens):
                job.replayed += 1
            else:
                rows.append(row)
        chosen = [jobs[row] for row in rows]
        outputs = []
        if chosen:
            own = logits if len(rows) == len(jobs) else logits[rows]
            choices = self._chooser.choose([job.request_id for job in chosen], own)
            for job, choice in zip(chosen, choices, strict=True):
                if choice.error:
                    held = self._texts[job.request_id].finish()
                    outputs.append(
                        self._finish(
                            job, "error", held, error=choice.error, is_refused=choice.is_refused
                        )
                    )
                else:
                    outputs.append(self._append(job, choice.token, choice.logprobs))
        for job in jobs:
            if job.steps_left == 0 and job in self._scheduler.running:
                self._remove_row(job)
                self._scheduler.extend(job)
        return outputs

    def _append(self, job: Job, token: int, logprobs: TokenLogprobs | None) -> Output:
        """Give `job` its new token."""
        params, text = job.request.sampling, self._texts[job.request_id]
        new = [token], [] if logprobs is None else [logprobs]
        job.tokens.append(token)
        self._chooser.append(job.request_id, token)
        job.replayed += 1
        self._new_tokens += 1
        if token in params.stop_ids(self._tokenizer.eos_id):
            return self._finish(job, "stop", text.finish(), *new, ends_with_stop_token=True)
        new_text = text.append(token)
        if text.stopped:
            return self._finish(job, "stop", new_text, *new)
        if len(job.tokens) == params.max_new_tokens:
            return self._finish(job, "length", new_text + text.finish(), *new)
        return Output(job.request_id, new[0], new_text, new[1], self._pop_prompt_logprobs(job))

    def _finish(
        self,
        job: Job,
        reason: FinishReason,
        text: str = "",
        tokens: Sequence[int] = (),
        logprobs: Sequence[TokenLogprobs] = (),
        ends_with_stop_token: bool = False,
        error: str = "",
        is_refused: bool = False,
    ) -> Output:
        """End `job`, wherever it is, and give its pages back."""
        if job in self._scheduler.running:
            self._remove_row(job)
        elif job in self._scheduler.prefilling:
            # Several prompts are taken in within one step: in between, there is but one.
            assert self._scheduler.prefilling == [job]
            self._scheduler.prefilling.clear()
            self._runner.release(job.request_id)
            self._forget_prefill()
        else:
            self._scheduler.waiting.remove(job)
        del self._texts[job.request_id]
        self._chooser.remove(job.request_id)
        of_prompt = self._pop_prompt_logprobs(job)
        return Output(
            job.request_id,
            tokens,
            text,
            logprobs,
            of_prompt,
            reason,
            ends_with_stop_token,
            error,
            is_refused,
        )

    def _pop_prompt_logprobs(self, job: Job) -> Sequence[TokenLogprobs]:
        return self._prompt_logprobs.pop(job.request_id, ())

    def _set_back(self, job: Job) -> None:
        self._remove_row(job)
        self._scheduler.preempt(job)

    def _remove_row(self, job: Job) -> None:
        running = self._scheduler.running
        row = running.index(job)
        running[row] = running[-1]
        running.pop()
        self._runner.leave(row)
        self._runner.release(job.request_id)
