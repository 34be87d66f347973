"""Retrieval from long texts: a fact is somewhere in a text that ends by asking for it.

A model is right if greedy decoding would give the whole answer. Texts have exactly the tokens that
their length says, and follow from seed, length, place and number alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from serve.evaluation.config import EvaluationConfig
from serve.evaluation.languages import Fact, Language, language_of
from serve.evaluation.results import Cell, TaskResult
from serve.evaluation.text_model import ScoredText, TextModel, TextScore
from stu.common.errors import UserError
from stu.tokenizer import Tokenizer


class Place(NamedTuple):
    """Length of a text, and the place of the fact that it asks for, from 0 to 1."""

    length: int
    depth: float


@dataclass(frozen=True)
class Example:
    """A text and where it asks."""

    place: Place
    text: ScoredText


class RetrievalTask(ABC):
    """A task over a grid of lengths and places.

    Args:
        name: Name of the task.
        config: Grid and seed.
        tokenizer: The model's tokenizer.
        longest: The model's `max_seq_len`.

    Raises UserError for lengths that the model, or the task's shortest text, does not allow.
    """

    def __init__(
        self, name: str, config: EvaluationConfig, tokenizer: Tokenizer, longest: int
    ) -> None:
        self.name = name
        self._start, language = tokenizer.start_ids, language_of(tokenizer)
        self.examples: list[Example] = []
        for length in config.chosen_lengths(longest):
            places = [Place(length, depth) for depth in config.chosen_depths()]
            try:
                self.examples += [
                    Example(place, self._text(place, language, _generator(config.seed, place, n)))
                    for place in places
                    for n in range(config.samples)
                ]
            except UserError:
                if config.lengths is not None or length == longest:
                    raise

    def run(self, model: TextModel) -> TaskResult:
        """Return the results of a model."""
        scores = model.score([example.text for example in self.examples])
        by_place: dict[Place, list[TextScore]] = {}
        for example, score in zip(self.examples, scores, strict=True):
            by_place.setdefault(example.place, []).append(score)
        metrics = _metrics(scores)
        for length in sorted({place.length for place in by_place}):
            own = [s for place, found in by_place.items() for s in found if place.length == length]
            metrics[f"acc_by_length/{length:06d}_tokens"] = _metrics(own)["acc"]
        cells = [Cell(*place, _metrics(found)) for place, found in by_place.items()]
        return TaskResult(metrics, len(scores), cells)

    def _text(self, place: Place, language: Language, random: np.random.Generator) -> ScoredText:
        before, asked = self._before(place, language, random)
        tokens = [*self._start, *before, *asked.key, *asked.value]
        assert len(tokens) == place.length
        return ScoredText(tokens, place.length - len(asked.value))

    @abstractmethod
    def _before(
        self, place: Place, language: Language, random: np.random.Generator
    ) -> tuple[list[int], Fact]:
        """Return the tokens before the question, and the fact that it asks for."""

    def _refuse(self, length: int) -> UserError:
        fix = f"{self.name} has no room in so few tokens: give larger ones"
        return UserError("lengths", length, fix=fix)


class Needle(RetrievalTask):
    """One fact in prose that has nothing to do with it."""

    def _before(
        self, place: Place, language: Language, random: np.random.Generator
    ) -> tuple[list[int], Fact]:
        fact = language.fact(random)
        question = len(fact.key) + len(fact.value)
        room = place.length - len(self._start) - question - len(fact.tokens)
        if room < 0:
            raise self._refuse(place.length)
        filler = language.filler(random, room)
        depth = round(place.depth * room)
        return filler[:depth] + fact.tokens + filler[depth:], fact


class Recall(RetrievalTask):
    """As many facts as there is room for, of which one is asked for (associative recall)."""

    def _before(
        self, place: Place, language: Language, random: np.random.Generator
    ) -> tuple[list[int], Fact]:
        room = place.length - len(self._start)
        facts: dict[tuple[int, ...], Fact] = {}
        used, question = 0, 0
        while True:
            fact = language.fact(random)
            longest = max(question, len(fact.key) + len(fact.value))
            if used + len(fact.tokens) + longest > room:
                break
            if tuple(fact.key) not in facts:
                facts[tuple(fact.key)] = fact
                used, question = used + len(fact.tokens), longest
        if len(facts) < 2:
            raise self._refuse(place.length)
        listed = list(facts.values())
        asked = listed[round(place.depth * (len(listed) - 1))]
        padding = language.filler(random, room - used - len(asked.key) - len(asked.value))
        return padding + [token for fact in listed for token in fact.tokens], asked


def _generator(seed: int, place: Place, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, place.length, round(1e6 * place.depth), number])


def _metrics(scores: Sequence[TextScore]) -> dict[str, float]:
    """Return means over texts: of whole answers, of their tokens, and nats for each token."""
    num_tokens = sum(score.num_tokens for score in scores)
    return {
        "acc": sum(score.is_greedy for score in scores) / len(scores),
        "token_acc": sum(score.num_hits for score in scores) / num_tokens,
        "nats_per_token": -sum(score.logprob for score in scores) / num_tokens,
    }
