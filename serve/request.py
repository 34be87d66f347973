"""Requests to the engine, and its outputs."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from serve.config import is_whole
from serve.sampling_params import SamplingParams
from stu.common.errors import UserError
from stu.common.text import require_unicode
from stu.config import ModelConfig

FinishReason = Literal["stop", "length", "abort", "error"]
Pooling = Literal["mean", "last"]
MOST_PRIORITY = 2**31 - 1


@dataclass(frozen=True)
class Request:
    """One prompt to decode. Raises UserError for a value that no model allows."""

    prompt_token_ids: Sequence[int]
    """Token ids of the prompt, at least one: BOS, if there is nothing else. Only the last ones are
    kept if `truncate_prompt_tokens` says so."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """Sampling settings of this request."""
    priority: int = 0
    """Requests with a lower number run first, and preempt running requests with a higher number if
    they need their rows or pages. Requests of equal priority run in order of arrival."""
    client: str = ""
    """Name of the client. Rows are shared evenly among clients whose requests have the same
    priority."""
    cache_salt: str = ""
    """Cached prefixes are shared only among requests with the same salt."""
    adapter: str = ""
    """Name of the LoRA adapter to use; empty for the base model."""
    new_token_ids: Sequence[int] = ()
    """New tokens that another engine has already generated; this engine continues after them."""
    prompt_logprobs_from: int = 1
    """Position of the first prompt token whose log probabilities are reported with
    `prompt_logprobs`."""
    pooling: Pooling | None = None
    """Pooling of the prompt's hidden states after the final norm into an embedding: `mean` over all
    positions, or `last` for that of the last token. It needs `max_new_tokens=0`."""

    def __post_init__(self) -> None:
        for name in ("prompt_token_ids", "new_token_ids"):
            ids = getattr(self, name)
            if not are_token_ids(ids):
                raise UserError(name, ids, "a list of token ids, whole numbers >= 0")
            object.__setattr__(self, name, tuple(ids))  # the caller's list may change
        if not self.prompt_token_ids:
            raise UserError("prompt_token_ids", [], fix="start the prompt with BOS")
        if not isinstance(self.sampling, SamplingParams):
            raise UserError("sampling", self.sampling, "SamplingParams")
        if (count := self.sampling.truncate_prompt_tokens) is not None:
            object.__setattr__(self, "prompt_token_ids", self.prompt_token_ids[-count:])
        if not isinstance(self.cache_salt, str):
            raise UserError("cache_salt", self.cache_salt, "a text")
        require_unicode("cache_salt", self.cache_salt)
        if not isinstance(self.adapter, str):
            raise UserError("adapter", self.adapter, "a text")
        require_unicode("adapter", self.adapter)
        is_number = isinstance(self.priority, int) and not isinstance(self.priority, bool)
        if not is_number or abs(self.priority) > MOST_PRIORITY:
            allowed = f"a whole number from {-MOST_PRIORITY} to {MOST_PRIORITY}"
            raise UserError("priority", self.priority, allowed)
        first, length = self.prompt_logprobs_from, len(self.prompt_token_ids)
        if not is_whole(first) or not 1 <= first <= length:
            raise UserError("prompt_logprobs_from", first, f"a whole number from 1 to {length}")
        if self.pooling not in (None, "mean", "last"):
            raise UserError("pooling", self.pooling, "mean or last")
        if self.pooling is not None and self.sampling.max_new_tokens:
            allowed = "0 with pooling, which generates nothing"
            raise UserError("max_new_tokens", self.sampling.max_new_tokens, allowed)
        if self.new_token_ids and len(self.new_token_ids) >= self.sampling.max_new_tokens:
            raise ValueError("new_token_ids: nothing is left to generate for this request")

    @property
    def prefix_salt(self) -> str:
        """Text that prompts must share to continue from the same prefix: an adapter changes what a
        prefix leaves behind."""
        return f"{len(self.adapter)} {self.adapter}{self.cache_salt}"


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log probability of a token under the model, before sampling settings apply."""

    token: int
    logprob: float
    """Log probability of `token`."""
    top: dict[int, float]
    """Log probabilities of the most probable tokens by id, in descending order; among equals, the
    lower id comes first."""
    rank: int
    """Place of `token` among all tokens in this order, from 1."""


@dataclass(frozen=True)
class Output:
    """Additions of one engine step to one request."""

    request_id: int
    new_token_ids: Sequence[int] = ()
    """New token ids, including a stop token and the tokens of a stop string, which add no text."""
    text: str = ""
    """New text in whole characters. The texts of a request, joined, are its completion."""
    logprobs: Sequence[TokenLogprobs] = ()
    """Log probabilities of `new_token_ids`, if requested."""
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    """Log probabilities of the prompt's tokens from `prompt_logprobs_from` on, if requested; in the
    first output that is not empty."""
    embedding: Sequence[float] = ()
    """Embedding of the prompt, if the request has a `pooling`, in its last output."""
    cached_tokens: int = 0
    """Number of prompt tokens taken from the prefix cache instead of computed."""
    finish_reason: FinishReason | None = None
    """Why the request ended, in its last output; None in all others."""
    ends_with_stop_token: bool = False
    """Whether the last of `new_token_ids` is a stop token."""
    error: str = ""
    """Explanation of `finish_reason == "error"`."""
    is_refused: bool = False
    """Whether the request is at fault for the error, and not the engine."""


def check_request(request: Request, model: ModelConfig) -> None:
    """Raise UserError if no engine can decode `request` with `model`."""
    for name, ids in {
        "prompt": request.prompt_token_ids,
        "stop_token_ids": request.sampling.stop_token_ids,
        "new_token_ids": request.new_token_ids,
        "logit_bias": request.sampling.logit_bias,
    }.items():
        require_in_vocabulary(name, ids, model.vocab_size)
    longest, count = model.max_seq_len, request.sampling.max_new_tokens
    length = len(request.prompt_token_ids)
    if length + count > longest:
        fix = f"lower the limit of new tokens to {longest - length} or shorten the prompt"
        # Gateways know these first words, and these last ones, and fall back to another model.
        raise UserError(
            "prompt",
            message=f"This model's maximum context length is {longest} tokens (max_seq_len="
            f"{longest}), and a prompt of {length} tokens and {count} new tokens are "
            f"{length + count}: "
            f"{fix if longest > length else 'the prompt is too long, shorten it'}",
            code="context_length_exceeded",
        )


def require_in_vocabulary(name: str, ids: Collection[int], vocab_size: int) -> None:
    """Raise UserError for the field `name` if it has an id that is not in the vocabulary."""
    if max(ids, default=0) >= vocab_size:
        fix = f"it has the id {max(ids)}, and the vocabulary ids 0 to {vocab_size - 1}: use the "
        raise UserError(name, fix=fix + "model's own tokenizer")


def are_token_ids(ids: object) -> bool:
    """Return whether `ids` is a list or tuple of whole numbers >= 0."""
    if not isinstance(ids, list | tuple):
        return False
    # Many times as fast as a loop over a long prompt.
    return set(map(type, ids)) <= {int} and min(ids, default=0) >= 0
