"""The settings of a run, as its parser reads them from the command line and from YAML files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser

from stu.common.cli import ArgumentParser
from train.config import check_settings
from train.data.loader import TokenData
from train.loggers import LOGGERS
from train.lora import LoraConfig
from train.module import FlashSTUModule
from train.parallel.config import ParallelConfig
from train.start.agreement import ParseError
from train.tasks.config import GROUP, RunEvaluation
from train.tuning.start import default_shape

DEFAULTS = {
    "max_steps": 10_000,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "val_check_interval": 1000,
    "num_sanity_val_steps": 1,
}
"""Defaults of trainer settings that differ from Lightning's."""
FORCED: dict[str, Any] = {
    "use_distributed_sampler": False,  # the data divides itself among the ranks
    "check_val_every_n_epoch": None,  # the stream has no end: count batches, not epochs
    "enable_model_summary": False,
}
"""Trainer settings that a run cannot choose."""
LEFT_OUT = {
    *FORCED,
    *("logger", "plugins", "default_root_dir", "enable_checkpointing", "enable_progress_bar"),
    "strategy",  # see `parallel`
    # These count epochs, or would do nothing here.
    *("max_epochs", "min_epochs", "min_steps", "limit_train_batches", "limit_test_batches"),
    *("limit_predict_batches", "overfit_batches", "reload_dataloaders_every_n_epochs"),
    *("fast_dev_run", "barebones", "sync_batchnorm", "model_registry", "enable_autolog_hparams"),
}
"""Trainer settings that `stu-train` does not offer."""


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run that are of none of its parts."""

    seed_everything: int = 0
    """Seed of the initial weights"""
    run_dir: Path = Path("runs/train")
    """Folder for checkpoints, logs and the record of jobs"""
    resume: str | None = None
    """Checkpoint to continue from: a path, `last`, or `auto` for the last one if there is one"""
    init_from: Path | None = None
    """Model directory, or published checkpoint, whose weights and shape a new run starts from; a
    resumed run does not read it"""
    init_tokens: Literal["same", "by-bytes"] = "same"
    """Embedding rows with `--init-from` if the data has another tokenizer: `same` refuses that;
    `by-bytes` keeps the rows of tokens with the same bytes, and starts all others at the mean"""
    checkpoint_every_steps: int = 1000
    """Optimizer steps between checkpoints"""
    checkpoint_every_minutes: float = 30.0
    """Maximum time between checkpoints"""
    keep_checkpoints: int = 3
    """Number of most recent checkpoints to keep"""
    hang_minutes: float = 30.0
    """Time without progress of training or of an evaluation after which a run ends itself"""


class Parser(ArgumentParser, LightningArgumentParser):
    """Lightning's parser of settings, whose errors are one line each."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        for name in LEFT_OUT:
            if re.search(rf"--trainer\.{name}\b|Group 'trainer' .* '{name}'", message):
                message = f"trainer.{name} is chosen by stu-train: leave it out"
        if "trainer.max_time" in message and "<class 'int'>" in message:
            message = "trainer.max_time: YAML takes this for a number; write it in quotes"
        message = " ".join(message.split())
        try:
            super().error(message, ex)
        except SystemExit as error:
            raise ParseError(message) from error


def add_settings(parser: Parser) -> None:
    """Add every setting of a run to `parser`."""
    parser.add_class_arguments(
        L.Trainer, "trainer", instantiate=False, sub_configs=True, skip=LEFT_OUT
    )
    parser.set_defaults({f"trainer.{name}": value for name, value in DEFAULTS.items()})
    parser.add_lightning_class_args(FlashSTUModule, "model")
    parser.add_lightning_class_args(TokenData, "data")
    parser.add_class_arguments(ParallelConfig, "parallel")
    parser.add_class_arguments(LoraConfig, "lora")
    parser.add_class_arguments(RunEvaluation, GROUP)
    # Users need not repeat what the token shards say.
    parser.set_defaults({"model.config.vocab_size": 0})
    parser.add_settings(RunSettings)
    add = parser.add_argument
    add(
        "--allow-change",
        action="append",
        help="Settings that may differ from those of the checkpoint: NAME[,NAME]",
    )
    loggers = f"Names of loggers, of {', '.join(LOGGERS)}"
    add("--logger", type=list[str], default=["tensorboard"], help=loggers)
    log_samples = "Write the numbers of the samples of each step into a file per rank"
    add("--log-samples", type=bool, default=False, help=log_samples)


def parse(parser: Parser, arguments: Sequence[str]) -> Any:
    """Return the settings in `arguments`; the model's shape is by default that of `--init-from`.

    Raises UserError; exits with code 2 for arguments that cannot be parsed.
    """
    settings = parser.parse_args(list(arguments))
    if shape := default_shape(settings):
        parser.set_defaults({f"model.config.{name}": value for name, value in shape.items()})
        settings = parser.parse_args(list(arguments))
    return settings


def parse_settings(arguments: Sequence[str]) -> Any:
    """Return the checked settings of a run that is only planned: no model is built, and of the data
    only the index is read.

    Raises UserError; exits with code 2 for arguments that cannot be parsed.
    """
    parser = Parser(prog="stu-plan")
    parser.add_argument("--config", action="config")
    add_settings(parser)
    settings = parse(parser, arguments)
    config, optimizer, parallel, evaluation = check_settings(settings, is_plan=True)
    settings.model.config, settings.model.optimizer, settings.parallel = config, optimizer, parallel
    settings.evaluation = evaluation
    return settings
