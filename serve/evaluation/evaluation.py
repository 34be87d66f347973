"""Tasks by name: loaded once, and run on a model as often as wanted."""

from importlib import import_module
from typing import TYPE_CHECKING

from serve.evaluation.config import RETRIEVAL, EvaluationConfig
from serve.evaluation.results import Results
from serve.evaluation.retrieval import RetrievalTask
from serve.evaluation.text_model import TextModel
from stu.common.errors import UserError, requires_extra
from stu.tokenizer import Tokenizer

if TYPE_CHECKING:
    from serve.evaluation.harness import HarnessTasks


class Evaluation:
    """Tasks that have been loaded.

    Args:
        config: Tasks to load.
        tokenizer: The model's tokenizer.
        longest: The model's `max_seq_len`.
        bootstrap: Number of samples for the standard errors of lm-eval's tasks; 0 for none.

    Raises UserError for a task that is not known or cannot be loaded, and if lm-eval is needed and
    not installed.
    """

    def __init__(
        self, config: EvaluationConfig, tokenizer: Tokenizer, longest: int, bootstrap: int = 0
    ) -> None:
        names = config.task_names
        if not names:
            allowed = f"names separated by commas, of {', '.join(RETRIEVAL)} and lm-eval's tasks"
            raise UserError("tasks", config.tasks, allowed)
        self._retrieval = [
            _retrieval_kind(name)(name, config, tokenizer, longest)
            for name in names
            if name in RETRIEVAL
        ]
        others = [name for name in names if name not in RETRIEVAL]
        self._harness = _harness_tasks(others, config, longest, bootstrap) if others else None

    def run(self, model: TextModel) -> Results:
        """Return the results of a model, by task. Raises UserError for one that does not fit."""
        results = {task.name: task.run(model) for task in self._retrieval}
        if self._harness is not None:
            results |= self._harness.run(model)
        return results


def _retrieval_kind(name: str) -> type[RetrievalTask]:
    module, _, attribute = RETRIEVAL[name].partition(":")
    kind: type[RetrievalTask] = getattr(import_module(module), attribute)
    return kind


def _harness_tasks(
    names: list[str], config: EvaluationConfig, longest: int, bootstrap: int
) -> "HarnessTasks":
    with requires_extra("eval"):
        from serve.evaluation.harness import HarnessTasks  # takes seconds

    return HarnessTasks(names, config, longest, bootstrap)
