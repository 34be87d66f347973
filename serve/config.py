"""The settings of an engine."""

import math
from dataclasses import dataclass
from typing import Literal

from stu.common.errors import UserError, setting_name

EngineWeights = Literal["float", "int8", "fp8"]
"""Format of the weights of dense layers while they decode."""
MOST_DRAFTS = 15
"""More would not be used: a step takes 16 tokens in all."""
USUAL_DRAFTS = 7
MOST_PAGE_LEN = 4096
INVARIANT_ROWS = 8
"""Rows that go through the model together under `batch_invariant`."""


@dataclass(frozen=True)
class EngineConfig:
    """Cache size and limits of an engine. Raises UserError for a value that is not allowed."""

    cache_gib: float | None = None
    """Size of the caches of all running requests, in GiB. None: half of the memory that is free
    after the model is loaded. With tensor parallelism, each device has caches of this size."""
    page_len: int = 32
    """Positions per cache page; a power of two from 2 to 4096."""
    max_running: int = 32
    """Maximum number of requests that decode together. With 1, float weights on a CPU have a layout
    that is faster for a single request."""
    prompt_tokens_per_step: int = 2048
    """Maximum number of prompt tokens to prefill in one step, in addition to one token of each
    running request. A larger number starts new requests sooner; a smaller one delays running
    requests less. A token counts as four if log probabilities of the whole prompt are requested."""
    expected_new_tokens: int | None = None
    """Number of new tokens for which a request first gets cache pages, if convolutions are cached
    in pages. A request that needs more is preempted, and prefilled again with pages for twice as
    many. This lets more requests run together if most stop long before `max_new_tokens`. None:
    pages for all new tokens from the start. Ignored with states, which need no pages."""
    convolution_cache: Literal["state", "pages"] | None = None
    """Cache of long convolutions. state: a state of constant size, which the filters of a spectral
    transform unit allow. pages: pending outputs in pages, by FutureFill; it grows with the number
    of new tokens. None: a state if the filters allow it, otherwise pages."""
    prefix_cache_gib: float | None = None
    """Part of `cache_gib` that may hold prefixes of prompts, for later requests that begin with the
    same tokens. None: up to a quarter, as far as running requests leave it free. 0: no prefix
    caching. Models whose long convolutions are cached in pages have no prefix cache."""
    weights: EngineWeights | None = None
    """Format of the weights of dense layers. int8: 8-bit integers, a quarter of the size of float32
    and half of bfloat16; products differ by about 1%. fp8: 8-bit floats, on GPUs that support them.
    float: the model's dtype. None: the format of the model directory."""
    speculate: Literal["ngram"] | None = None
    """Source of draft tokens for speculative decoding, in which a step can accept several tokens of
    a request. ngram: the tokens that followed the same last few tokens earlier in the prompt or the
    new text. It helps where text repeats itself and at most four requests decode, and pauses while
    drafts are rejected. The distribution of the text does not change. Not supported on CUDA. None:
    no speculative decoding."""
    num_speculative_tokens: int | None = None
    """Maximum number of draft tokens per request and step; only with `speculate`. None: 7."""
    batch_invariant: bool = False
    """Make the logits of a request independent of the other requests, to the last bit. Slower."""
    overlap: bool | None = None
    """Whether the device computes the next tokens while the host processes the last ones. Text
    arrives one step later, and throughput is higher. Steps with a request that must match a schema
    or regular expression still wait for the host. None: only on CUDA."""
    enforce_eager: bool = False
    """Launch the operations of a decoding step one by one instead of replaying a CUDA graph.
    Slower, but starts sooner and takes less memory. No effect on a CPU."""

    @property
    def most_drafts(self) -> int:
        """Most tokens that a step takes of a request besides the one that is known."""
        return 0 if self.speculate is None else self.num_speculative_tokens or USUAL_DRAFTS

    def __post_init__(self) -> None:
        gib, page_len, expected = self.cache_gib, self.page_len, self.expected_new_tokens
        is_gib = gib is None or (_is_number(gib) and 0 < gib < math.inf)
        self._require("cache_gib", is_gib, "above 0, in GiB")
        part = self.prefix_cache_gib
        is_part = part is None or (_is_number(part) and 0 <= part < math.inf)
        self._require("prefix_cache_gib", is_part, "0 or above, in GiB")
        is_len = is_whole(page_len) and 2 <= page_len <= MOST_PAGE_LEN
        is_len = is_len and page_len & (page_len - 1) == 0
        self._require("page_len", is_len, f"a power of two from 2 to {MOST_PAGE_LEN}")
        for name in ("max_running", "prompt_tokens_per_step"):
            count = getattr(self, name)
            self._require(name, is_whole(count) and count >= 1, "a whole number >= 1")
        is_count = expected is None or (is_whole(expected) and expected >= 1)
        self._require("expected_new_tokens", is_count, "a whole number >= 1, or null")
        self._require("speculate", self.speculate in (None, "ngram"), "ngram, or null for none")
        drafts = self.num_speculative_tokens
        is_count = drafts is None or (is_whole(drafts) and 1 <= drafts <= MOST_DRAFTS)
        self._require("num_speculative_tokens", is_count, f"a whole number from 1 to {MOST_DRAFTS}")
        if drafts is not None and self.speculate is None:
            fix = f"nothing is guessed without {setting_name('speculate')}; leave it out"
            raise UserError("num_speculative_tokens", drafts, fix=fix)
        is_cache = self.convolution_cache in (None, "state", "pages")
        self._require("convolution_cache", is_cache, "state or pages, or null to choose by itself")
        is_format = self.weights in (None, "float", "int8", "fp8")
        self._require(
            "weights", is_format, "float, int8 or fp8, or null for that of the model directory"
        )
        is_switch = self.overlap is None or isinstance(self.overlap, bool)
        self._require("overlap", is_switch, "true or false, or null to choose by the device")
        for name in ("batch_invariant", "enforce_eager"):
            self._require(name, isinstance(getattr(self, name), bool), "true or false")
        if self.overlap and self.speculate is not None:
            raise UserError("overlap", True, f"false or null with {setting_name('speculate')}")
        if self.batch_invariant and expected is not None:
            raise UserError(
                "expected_new_tokens",
                message=f"{setting_name('expected_new_tokens')}={expected} is not allowed with "
                f"{setting_name('batch_invariant')}: prefilling a request again rounds "
                "differently; leave one of them out",
            )

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise UserError(name, getattr(self, name), allowed)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Return whether `value` is a whole number >= 0, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
