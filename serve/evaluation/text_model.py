"""The model of an evaluation: what tasks ask of it, and the engine that answers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.offline import run_requests
from serve.request import Request, TokenLogprobs
from serve.sampling_params import SamplingParams
from stu.common.errors import UserError
from stu.model import FlashSTU
from stu.tokenizer import Tokenizer


@dataclass(frozen=True)
class ScoredText:
    """A text whose last tokens are scored."""

    tokens: Sequence[int]
    """Token ids of the whole text, at most `max_length`."""
    first: int
    """Position of the first token that is scored, at least 1."""


@dataclass(frozen=True)
class TextScore:
    """Score of a text's last tokens."""

    logprob: float
    """Sum of their natural log probabilities."""
    num_hits: int
    """Number of them that were the most probable."""
    num_tokens: int

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would give these tokens."""
        return self.num_hits == self.num_tokens


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and how."""

    tokens: Sequence[int]
    max_new_tokens: int
    stop: Sequence[str] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class TextModel(ABC):
    """A model that scores and continues texts, many at a time."""

    tokenizer: Tokenizer
    max_length: int
    """Most tokens of a text, its continuation included."""

    @abstractmethod
    def score(self, texts: Sequence[ScoredText]) -> list[TextScore]:
        """Return the scores of texts, in their order."""

    @abstractmethod
    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the continuations of prompts, in their order."""


class EngineModel(TextModel):
    """A model that scores and continues texts in its own engine.

    Args:
        model: Model, on the device to compute on.
        tokenizer: The model's tokenizer.
        config: Settings of the engine.
        use_tqdm: Whether to show progress bars.

    Raises UserError for settings that do not fit the model.
    """

    def __init__(
        self,
        model: FlashSTU,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        use_tqdm: bool = False,
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, model.config.max_seq_len
        self._engine, self._use_tqdm = Engine(model, tokenizer, config), use_tqdm

    def score(self, texts: Sequence[ScoredText]) -> list[TextScore]:
        """See `TextModel.score`. Raises UserError for a text that the engine refuses."""
        sampling = SamplingParams(max_new_tokens=0, prompt_logprobs=1)
        requests = [
            Request(text.tokens, sampling, prompt_logprobs_from=text.first)
            for text in texts
            if text.first < len(text.tokens)
        ]
        answers = iter(run_requests(self._engine, requests, self._use_tqdm, "text"))
        scores = []
        for text in texts:
            logprobs: Sequence[TokenLogprobs] = ()
            if text.first < len(text.tokens):
                answer = next(answers)
                if answer.error:
                    raise UserError("model", message=answer.error)
                logprobs = answer.prompt_logprobs
            scores.append(
                TextScore(
                    math.fsum(token.logprob for token in logprobs),
                    sum(token.token == next(iter(token.top)) for token in logprobs),
                    len(logprobs),
                )
            )
        return scores

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """See `TextModel.generate`. EOS ends a text. Raises UserError likewise."""
        requests = [
            Request(
                prompt.tokens,
                SamplingParams(
                    temperature=prompt.temperature,
                    top_k=prompt.top_k,
                    top_p=prompt.top_p,
                    max_new_tokens=prompt.max_new_tokens,
                    stop=prompt.stop,
                    seed=prompt.seed,
                ),
            )
            for prompt in prompts
        ]
        answers = run_requests(self._engine, requests, self._use_tqdm, "completion")
        for answer in answers:
            if answer.error:
                raise UserError("model", message=answer.error)
        return [answer.text for answer in answers]
