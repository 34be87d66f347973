"""Load and counts of an engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.cache.base import ConvolutionCacheInfo
from serve.cache.budget import Caches
from serve.cache.paged_futurefill import PagedFutureFill
from serve.engine.prefixes import Prefixes
from serve.engine.scheduler import Scheduler


@dataclass
class SpeculationCounts:
    """Counts of guesses."""

    num_drafts: int = 0
    """Steps that guessed tokens of a request, for each request."""
    num_draft_tokens: int = 0
    """Tokens guessed."""
    num_accepted_tokens: int = 0
    """Guesses that were right."""

    def add(self, guessed: int, right: int) -> None:
        """Count the guesses of a step for a request."""
        self.num_drafts += 1
        self.num_draft_tokens += guessed
        self.num_accepted_tokens += right


@dataclass(frozen=True)
class Stats:
    """Load of an engine, and its counts since it was made."""

    waiting: int
    """Requests that wait for a row."""
    running: int
    """Requests that are prefilled or decode."""
    convolution_pages: int
    convolution_pages_used: int
    attention_pages: int
    attention_pages_used: int
    prompt_tokens: int
    """Tokens prefilled. Remembered ones are not counted, and those of preempted requests again."""
    new_tokens: int
    """Tokens generated."""
    preemptions: int
    steps: int
    prefix_tokens_asked: int = 0
    """Prompt tokens of admitted requests that use the prefix cache."""
    prefix_tokens_found: int = 0
    """How many of them were remembered."""
    flushes: Mapping[int, tuple[int, float]] = field(default_factory=dict)
    """Number of steps that flushed tiles of the convolution, and their seconds (on a GPU, until
    launched), by the positions of a tile."""
    convolution_cache: ConvolutionCacheInfo | None = None
    """The cache of long convolutions, if the model has any."""
    spec_decode_num_drafts: int = 0
    """Steps that guessed tokens of a request, for each request."""
    spec_decode_num_draft_tokens: int = 0
    """Tokens guessed."""
    spec_decode_num_accepted_tokens: int = 0
    """Guesses that were right."""

    @classmethod
    def of(
        cls,
        scheduler: Scheduler,
        caches: Caches,
        prefixes: Prefixes,
        prompt_tokens: int,
        new_tokens: int,
        steps: int,
        guesses: SpeculationCounts,
    ) -> "Stats":
        """Return the stats of an engine with these parts and counts."""
        capacity, used, convolution = caches.capacity, caches.used, caches.convolution
        return cls(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running) + len(scheduler.prefilling),
            convolution_pages=capacity.convolution,
            convolution_pages_used=used.convolution,
            attention_pages=capacity.attention,
            attention_pages_used=used.attention,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            preemptions=scheduler.num_preemptions,
            steps=steps,
            prefix_tokens_asked=prefixes.tokens_asked,
            prefix_tokens_found=prefixes.tokens_found,
            flushes=dict(convolution.flushes) if isinstance(convolution, PagedFutureFill) else {},
            convolution_cache=caches.convolution_info,
            spec_decode_num_drafts=guesses.num_drafts,
            spec_decode_num_draft_tokens=guesses.num_draft_tokens,
            spec_decode_num_accepted_tokens=guesses.num_accepted_tokens,
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Stats":
        """Return the stats whose `asdict` went through JSON or msgpack."""
        flushes = {int(length): tuple(pair) for length, pair in values["flushes"].items()}
        info = values["convolution_cache"]
        cache = ConvolutionCacheInfo(**info) if info else None
        return cls(**{**values, "flushes": flushes, "convolution_cache": cache})
