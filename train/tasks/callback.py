"""Evaluations every so many steps, logged beside the other metrics of a run."""

import gc
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from serve.evaluation.evaluation import Evaluation
from serve.evaluation.results import Results, logged_metrics, write_report
from serve.evaluation.text_model import EngineModel, TextModel
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.tokenizer import read_tokenizer
from train.callbacks.interruption import Interruption, ends_step
from train.callbacks.progress import warned
from train.callbacks.watchdog import Watchdog
from train.lora import LoraConfig
from train.tasks.config import GROUP, RunEvaluation
from train.tasks.ranks import (
    EvaluationCutShort,
    EvaluationFailed,
    Ranks,
    SharedModel,
    described,
    follow,
)
from train.tasks.whole_model import room, whole_model

if TYPE_CHECKING:
    from train.module import FlashSTUModule

FOLDER = "evaluation"
"""Folder of results in that of a run."""


class TaskEvaluation(L.Callback):
    """Callback that evaluates the model on tasks, in an engine on each rank.

    Texts are divided among the ranks. An evaluation that fails is warned of, and one is cut short
    when the run is to stop. It changes neither the weights nor the random numbers of the run.

    Args:
        config: Tasks, and when to run them; without tasks there are no evaluations.
        lora: Settings of the model's adapters.
        run_dir: Folder of the run; results go into its folder `evaluation`.
        interruption: Callback that knows whether the run is to stop.
        watchdog: Callback that ends a run in which nothing happens.
    """

    def __init__(
        self,
        config: RunEvaluation,
        lora: LoraConfig,
        run_dir: Path,
        interruption: Interruption,
        watchdog: Watchdog,
    ) -> None:
        self._config, self._lora, self._folder = config, lora, run_dir / FOLDER
        self._interruption, self._watchdog = interruption, watchdog
        self._evaluation: Evaluation | None = None
        self._evaluated = 0

    def prepare(self, model: ModelConfig, tokenizer_path: Path) -> None:
        """Load the tasks; on the first rank, before the run. Raises UserError."""
        if self._config.task_names:
            tokenizer = read_tokenizer(tokenizer_path, model.vocab_size)
            try:
                self._evaluation = Evaluation(self._config, tokenizer, model.max_seq_len)
            except UserError as error:
                raise error.renamed(f"{GROUP}.{error.field}") from error

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *hook: Any) -> None:
        # The last step's evaluation follows its checkpoint.
        is_last = trainer.should_stop or trainer.global_step == trainer.max_steps
        is_due = trainer.global_step % self._config.every_steps == 0
        if is_due and not is_last and ends_step(trainer, pl_module, *hook):
            self._evaluate(trainer, pl_module)
            if self._interruption.received is not None:
                trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._interruption.received is None and trainer.global_step != self._evaluated:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: L.Trainer, module: "FlashSTUModule") -> None:
        """Evaluate the model and log the results; collective."""
        if not self._config.task_names:
            return
        began, step = time.monotonic(), trainer.global_step
        self._evaluated, results = step, None
        with isolate_rng():
            try:
                results = self._run(trainer, module)
            except EvaluationCutShort:
                rank_zero_warn(f"the evaluation at step {step} was cut short")
            except EvaluationFailed as error:
                rank_zero_warn(f"the evaluation at step {step} failed ({error}); training goes on")
        gc.collect()
        if module.device.type == "cuda":
            torch.cuda.empty_cache()
        if results is not None:
            self._log(trainer, results, step, time.monotonic() - began)
        module.throughput.leave_out(time.monotonic() - began)

    def _run(self, trainer: L.Trainer, module: "FlashSTUModule") -> Results | None:
        """Return the results on the first rank, None on others.

        Collective. Raises EvaluationFailed or EvaluationCutShort on all ranks.
        """
        ranks = Ranks(module.device, partial(self._after_round, trainer))
        model = self._engine_model(trainer, module, ranks)
        if ranks.rank > 0:
            follow(ranks, model)
            return None
        assert self._evaluation is not None, "the first rank has prepared it"
        shared = SharedModel(ranks, model)
        try:
            results = self._evaluation.run(shared)
        except (EvaluationFailed, EvaluationCutShort):
            raise
        except Exception as error:  # of any kind, from tasks
            shared.end(described(error))
            raise EvaluationFailed(str(error)) from error
        shared.end()
        return results

    def _engine_model(
        self, trainer: L.Trainer, module: "FlashSTUModule", ranks: Ranks
    ) -> TextModel:
        """Return an engine with a copy of the model; collective. Raises EvaluationFailed."""
        if module.device.type == "cuda":
            torch.cuda.empty_cache()
        held = ranks.attempt(partial(room, trainer, module.model))
        whole = whole_model(trainer, module.model, held, self._lora)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        tokenizer = read_tokenizer(data.tokenizer_path, module.config.vocab_size)
        return ranks.attempt(partial(EngineModel, whole, tokenizer, self._config.engine))

    def _after_round(self, trainer: L.Trainer) -> bool:
        self._watchdog.note()
        return self._interruption.agree(trainer)

    def _log(self, trainer: L.Trainer, results: Results, step: int, seconds: float) -> None:
        metrics = logged_metrics(results)
        loggers: list[Any] = trainer.loggers
        for logger in loggers:
            logger.log_metrics(metrics, step)
        with warned("the results of an evaluation"):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_report(self._folder / f"step-{step:08d}.json", results, step=step)
        shown = ", ".join(
            f"{task} {name} {value:.4f}"
            for task, result in results.items()
            for name, value in result.metrics.items()
            if "/" not in name and "stderr" not in name
        )
        print(f"evaluation at step {step} ({seconds:.0f} s): {shown}", file=sys.stderr)
