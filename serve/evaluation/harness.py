"""lm-eval's tasks, with a model of ours as lm-eval sees it."""

import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
from huggingface_hub import constants
from lm_eval.api.metrics import weighted_perplexity
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from serve.evaluation.config import RETRIEVAL, EvaluationConfig
from serve.evaluation.results import Results, TaskResult
from serve.evaluation.text_model import Prompt, ScoredText, TextModel
from serve.prompts import derived_seed
from stu.common.errors import UserError
from stu.common.text import nearest
from stu.tokenizer import encode_text

NEW_TOKENS = 256
"""New tokens of a task that does not say how many."""
NEW_TOKENS_NAMES = "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"
GENERATION = {"until", "do_sample", "temperature", "top_k", "top_p", *NEW_TOKENS_NAMES}
"""Generation settings of tasks that are known."""
FEWSHOT_SEED = 1234
"""lm-eval's own seed of the choice of examples."""


class HarnessModel(LM):  # type: ignore[misc]
    """The interface of lm-eval to a model.

    Texts begin with BOS, if there is one, as they did in training. Without BOS, a text that has no
    context follows EOS; without EOS too, its first token is not scored.
    """

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        self._model, self._tokenizer = model, model.tokenizer

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return the log probability of each continuation of a context, and whether greedy decoding
        would give it."""
        scores = self._model.score([self._scored(*request.args) for request in requests])
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log probability of each text, in pieces where it is longer than the model's
        context: each token once, after as many as fit in the last piece and at least one."""
        pieces = [
            (number, piece)
            for number, request in enumerate(requests)
            for piece in _pieces(self._with_start(*request.args), self._model.max_length)
        ]
        sums = [0.0] * len(requests)
        scores = self._model.score([piece for _, piece in pieces])
        for (number, _), score in zip(pieces, scores, strict=True):
            sums[number] += score.logprob
        return sums

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return a continuation of each context, to the first of some strings."""
        return self._model.generate(
            [self._prompt(number, *request.args) for number, request in enumerate(requests)]
        )

    def _scored(self, context: str, continuation: str) -> ScoredText:
        # As in lm-eval, spaces belong to the word after them.
        stripped = context.rstrip()
        continuation, context = context[len(stripped) :] + continuation, stripped
        tokens = self._with_start(context + continuation)
        num_start = len(tokens) - len(self._encode(context + continuation))
        # Where the continuation ends in a token that the context begins, that token is scored.
        first = max(1, min(num_start + len(self._encode(context)), len(tokens) - 1))
        left_out = max(0, len(tokens) - self._model.max_length)
        if first <= left_out:
            raise UserError(
                "tasks",
                message=f"a continuation of {len(tokens) - first} tokens is longer than the "
                f"model's context of {self._model.max_length}: leave its task out",
            )
        return ScoredText(tokens[left_out:], first - left_out)

    def _prompt(self, number: int, context: str, given: Mapping[str, Any]) -> Prompt:
        longest = self._model.max_length
        new_tokens = _new_tokens(given, longest)
        tokens = [*self._tokenizer.start_ids, *self._encode(context)] or self._tokenizer.end_ids
        until = given.get("until") or []
        temperature = float(given.get("temperature") or 0)
        return Prompt(
            tokens[new_tokens - longest :],
            new_tokens,
            [until] if isinstance(until, str) else [stop for stop in until if stop],
            temperature if given.get("do_sample", temperature > 0) else 0.0,
            int(given.get("top_k") or 0),
            1.0 if given.get("top_p") is None else float(given["top_p"]),
            derived_seed(0, number),
        )

    def _with_start(self, text: str) -> list[int]:
        """Return the tokens of a text after one that it follows, if there is any."""
        return (self._tokenizer.start_ids or self._tokenizer.end_ids) + self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return encode_text(self._tokenizer, "tasks", text)


class HarnessTasks:
    """Tasks of lm-eval, with their data sets.

    Args:
        names: Names of tasks and groups, or YAML files.
        config: Where they come from, and how many documents are used.
        longest: See `Evaluation`.
        bootstrap: See `Evaluation`.

    Raises UserError.
    """

    def __init__(
        self, names: list[str], config: EvaluationConfig, longest: int, bootstrap: int
    ) -> None:
        self._limit, self._bootstrap = config.limit, bootstrap
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        datasets.disable_progress_bars()
        if not config.allow_hub:
            # These were read from the environment when somebody imported the libraries.
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
            os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
        with _stdout_kept():
            self._loaded = _load(names, config.include_path)
        for name, task in self._loaded["tasks"].items():
            for kind in ("UNSAFE_CODE", "MULTIMODAL"):
                if getattr(task, kind, False):
                    reason = "runs code that the model writes" if kind == "UNSAFE_CODE" else ""
                    reason = reason or "needs more than text"
                    raise UserError("tasks", name, fix=f"it {reason}: leave it out")
            _new_tokens(task.get_config("generation_kwargs") or {}, longest)
            aggregations = task.aggregation()
            for metric, aggregate in aggregations.items():
                if aggregate is weighted_perplexity:
                    aggregations[metric] = _perplexity
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)

    def run(self, model: TextModel) -> Results:
        """Return the results of a model, by task and group."""
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the choice goes on from here
        with _stdout_kept(), _quiet():
            found = evaluate(
                HarnessModel(model),
                self._loaded,
                limit=self._limit,
                bootstrap_iters=self._bootstrap,
                log_samples=False,
            )
        return {
            name: TaskResult(
                _metrics(values),
                found["n-samples"].get(name, {}).get("effective", 0) or _count(found, name),
                version=found["versions"].get(name),
                num_fewshot=found["n-shot"].get(name),
                higher_is_better={
                    metric: is_better
                    for metric, is_better in found["higher_is_better"].get(name, {}).items()
                    if is_better is not None
                },
            )
            for name, values in found["results"].items()
            if _metrics(values)
        }


def _new_tokens(given: Mapping[str, Any], longest: int) -> int:
    """Return the most new tokens that generation settings allow, in a model's context of `longest`
    tokens. Raises UserError for settings that are not known, or for more than fit."""
    if unknown := given.keys() - GENERATION:
        message = f"generation_kwargs: {', '.join(sorted(unknown))} of a task are not known"
        raise UserError("tasks", message=f"{message}; known are {', '.join(sorted(GENERATION))}")
    counts = [int(given[name]) for name in NEW_TOKENS_NAMES if given.get(name) is not None]
    if counts and counts[0] >= longest:
        raise UserError(
            "tasks",
            message=f"a task generates {counts[0]} tokens, and the model has a context of "
            f"{longest}: leave it out",
        )
    return counts[0] if counts else min(NEW_TOKENS, longest // 2)


def _load(names: list[str], include_path: Path | None) -> Any:
    """Return lm-eval's tasks and groups. Raises UserError."""
    # lm-eval's own tasks are thousands of files, which take 10 s to read.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not all(name in manager.all_tasks or Path(name).is_file() for name in names):
        manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            hint = nearest(name, [*RETRIEVAL, *manager.all_tasks])
            raise UserError("tasks", name, fix=f"no task of lm-eval has this name{hint}")
    try:
        return manager.load(names)
    except Exception as error:  # of any kind, from files of tasks and from data sets
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            "tasks", message=f"lm-eval cannot load {', '.join(names)} ({reason[:500]})"
        ) from error


def _pieces(tokens: list[int], longest: int) -> Iterator[ScoredText]:
    first = 1
    while first < len(tokens):
        stop = min(first + longest - 1, len(tokens))
        begin = max(0, stop - longest)
        yield ScoredText(tokens[begin:stop], first - begin)
        first = stop


def _perplexity(items: Sequence[tuple[float, float]]) -> float:
    """Return lm-eval's perplexity, infinity where it is too large for a number: of long words."""
    try:
        return float(weighted_perplexity(items))
    except OverflowError:
        return math.inf


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among a task's results, whose names are `METRIC,FILTER`."""
    return {
        name.removesuffix(",none").replace(",", "/"): float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, int | float)
    }


def _count(found: Mapping[str, Any], group: str) -> int:
    """Return the number of documents of a group's tasks."""
    members = found["group_subtasks"].get(group, ())
    return sum(
        found["n-samples"].get(name, {}).get("effective", 0) or _count(found, name)
        for name in members
    )


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """Let what lm-eval prints go to stderr, as stdout is for results."""
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Show no bars for the building of requests, and start no processes for standard errors."""
    module: Any = lm_eval.api.task
    module.tqdm, former = partial(tqdm, disable=True), os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        module.tqdm = tqdm
        if former is None:
            del os.environ["DISABLE_MULTIPROC"]
