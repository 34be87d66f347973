"""A model that every rank has whole, and whose texts are divided among the ranks.

The first rank runs the tasks, and tells the others what to compute: `SharedModel` there, `follow`
on the others. All ranks answer after each round, the failed ones with their error, so that none
waits for another. What they exchange is JSON.
"""

import json
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from serve.evaluation.text_model import Prompt, ScoredText, TextModel, TextScore

T = TypeVar("T")
TEXTS_AT_ONCE, TOKENS_AT_ONCE = 64, 2**18
"""Texts that each rank computes in a round, at most, and their tokens; one text may have more.
Signals are heeded after each round."""
WORK: dict[str, Callable[[Any], Any]] = {
    "score": lambda values: ScoredText(**values),
    "generate": lambda values: Prompt(**values),
}
"""Methods of `TextModel`, and the objects that they take, given their fields."""


class EvaluationFailed(Exception):
    """An evaluation that a rank could not go on with."""


class EvaluationCutShort(Exception):
    """An evaluation that ends because the run is to stop."""


class Ranks:
    """All ranks of a run, which exchange values that JSON can hold.

    Args:
        device: Device of this rank.
        after_round: Function that all ranks call after each round, and that returns whether they
            are to stop; collective.
    """

    def __init__(self, device: torch.device, after_round: Callable[[], bool]) -> None:
        is_alone = not dist.is_initialized()
        self.rank, self.size = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
        self._device, self._after_round = device, after_round

    def tell(self, value: Any = None) -> Any:
        """Return the first rank's value on all ranks; collective."""
        if self.size == 1:
            return value
        own = self._packed(value)
        size = torch.tensor([len(own)], device=self._device)
        dist.broadcast(size, 0)
        held = own if self.rank == 0 else own.new_empty(int(size))
        dist.broadcast(held, 0)
        return _unpacked(held)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order; collective."""
        if self.size == 1:
            return [value]
        own = self._packed(value)
        sizes = torch.zeros(self.size, dtype=torch.long, device=self._device)
        sizes[self.rank] = len(own)
        dist.all_reduce(sizes)
        padded = own.new_zeros(int(sizes.max()))
        padded[: len(own)] = own
        held = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(held, padded)
        return [_unpacked(part[:size]) for part, size in zip(held, sizes.tolist(), strict=True)]

    def attempt(self, work: Callable[[], T]) -> T:
        """Return the result of `work`, which every rank does by itself; collective.

        Raises EvaluationFailed on all ranks if it raises anything on one.
        """
        failure = None
        try:
            result = work()
        except Exception as error:  # of any kind: the others must not wait for this rank
            failure = f"rank {self.rank} on {socket.gethostname()}: {described(error)}"
        if failures := [found for found in self.gather(failure) if found is not None]:
            raise EvaluationFailed("; ".join(failures[:4]))
        return result

    def compute(self, model: TextModel, method: str, items: Sequence[Any]) -> list[Any]:
        """Let each rank compute its share of a round, and return all answers as fields, or texts.

        Collective. Raises EvaluationFailed or EvaluationCutShort on all ranks.
        """
        gathered = self.gather(
            self.attempt(lambda: _answers(model, method, items[self.rank :: self.size]))
        )
        if self._after_round():
            raise EvaluationCutShort
        return [gathered[place % self.size][place // self.size] for place in range(len(items))]

    def _packed(self, value: Any) -> Tensor:
        text = bytearray(json.dumps(value).encode())
        return torch.frombuffer(text, dtype=torch.uint8).to(self._device)


class SharedModel(TextModel):
    """The model of all ranks, on the first one. `end` must follow, whatever happens.

    Args:
        ranks: All ranks.
        model: This rank's copy of the model.
    """

    def __init__(self, ranks: Ranks, model: TextModel) -> None:
        self.tokenizer, self.max_length = model.tokenizer, model.max_length
        self._ranks, self._model = ranks, model
        self._is_over = False

    def score(self, texts: Sequence[ScoredText]) -> list[TextScore]:
        """See `TextModel.score`. Raises EvaluationFailed or EvaluationCutShort."""
        return [TextScore(**values) for values in self._rounds("score", texts)]

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """See `TextModel.generate`. Raises EvaluationFailed or EvaluationCutShort."""
        return self._rounds("generate", prompts)

    def end(self, failure: str | None = None) -> None:
        """Let the other ranks end too, unless they have; collective."""
        if not self._is_over:
            self._is_over = True
            self._ranks.tell({"end": failure})

    def _rounds(self, method: str, work: Sequence[Any]) -> list[Any]:
        answers = []
        for chunk in rounds(work, self._ranks.size):
            items = [asdict(item) for item in chunk]
            self._ranks.tell({"method": method, "items": items})
            try:
                answers += self._ranks.compute(self._model, method, items)
            except (EvaluationFailed, EvaluationCutShort):
                self._is_over = True  # the others raise it too
                raise
        return answers


def follow(ranks: Ranks, model: TextModel) -> None:
    """Compute what the first rank tells, until it ends; on all others.

    Raises EvaluationFailed or EvaluationCutShort.
    """
    while "end" not in (order := ranks.tell()):
        ranks.compute(model, order["method"], order["items"])
    if order["end"] is not None:
        raise EvaluationFailed(order["end"])


def rounds(work: Sequence[Any], num_ranks: int) -> Iterator[list[Any]]:
    """Divide texts or prompts into those that the ranks compute in one round."""
    chunk: list[Any] = []
    tokens = 0
    for item in work:
        cost = len(item.tokens) + getattr(item, "max_new_tokens", 0)
        is_full = len(chunk) == TEXTS_AT_ONCE * num_ranks
        if chunk and (is_full or tokens + cost > TOKENS_AT_ONCE * num_ranks):
            yield chunk
            chunk, tokens = [], 0
        chunk.append(item)
        tokens += cost
    if chunk:
        yield chunk


def described(error: Exception) -> str:
    """Return an error in one line, after printing where it was raised."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _unpacked(held: Tensor) -> Any:
    return json.loads(held.cpu().numpy().tobytes())


def _answers(model: TextModel, method: str, items: Sequence[Any]) -> list[Any]:
    """Return what a method of the model answers, as fields or texts."""
    found = getattr(model, method)([WORK[method](item) for item in items])
    return [asdict(answer) if isinstance(answer, TextScore) else answer for answer in found]
