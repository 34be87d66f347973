"""One training run: from command-line arguments to a trained model."""

import hashlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only

from stu.common.cli import ArgumentParser
from stu.common.files import new_file
from train.callbacks.bad_steps import TooManyBadSteps
from train.callbacks.interruption import Interruption
from train.callbacks.progress import SampleLog, StepProgress
from train.callbacks.watchdog import Watchdog
from train.checkpoint.callback import (
    CHECKPOINTS,
    Checkpoints,
    FolderIO,
    last_good_checkpoint,
    verified_checkpoint,
)
from train.checkpoint.folder import CheckpointFolder
from train.checkpoint.writer import CheckpointWriter
from train.config import check_settings as check_run_settings
from train.config import data_warnings
from train.data.loader import TokenData
from train.data.shards import INDEX_FILE
from train.fit_loop import FitLoop
from train.module import FlashSTUModule
from train.parallel.config import ParallelConfig, make_strategy, prepare_blocks
from train.start.agreement import ParseError, Start, UserError, flatten, versions
from train.start.launch import Launch, detect_launch
from train.start.launcher import Launcher
from train.start.owner import RunOwner
from train.start.provenance import provenance
from train.start.same_run import (
    DATA,
    MODEL,
    OPTIMIZER,
    SCHEDULE,
    check_same,
    check_shapes,
    result_settings,
    saved_settings,
    warn_of_differences,
)
from train.start.signals import EXIT_CODES

DEFAULTS = {
    "max_steps": 10_000,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "val_check_interval": 1000,
    "num_sanity_val_steps": 1,
}
"""Of the trainer's settings, where Lightning's are not fit for this."""
FORCED: dict[str, Any] = {
    "use_distributed_sampler": False,  # the data divides itself among the ranks
    "check_val_every_n_epoch": None,  # the stream has no end: count batches, not epochs
    "enable_model_summary": False,
}
LEFT_OUT = {
    *FORCED,
    *("logger", "plugins", "default_root_dir", "enable_checkpointing", "enable_progress_bar"),
    "strategy",  # `parallel` has it
    # These count epochs, or would do nothing here.
    *("max_epochs", "min_epochs", "min_steps", "limit_train_batches", "limit_test_batches"),
    *("limit_predict_batches", "overfit_batches", "reload_dataloaders_every_n_epochs"),
    *("fast_dev_run", "barebones", "sync_batchnorm", "model_registry", "enable_autolog_hparams"),
}
"""The trainer's settings that `stu-train` does not offer."""
TOO_MANY_BAD_STEPS = 65
"""Exit code (sysexits' EX_DATAERR)."""


class Parser(ArgumentParser, LightningArgumentParser):
    """Lightning's parser of settings, with our errors, each on one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        for name in LEFT_OUT:
            if re.search(rf"--trainer\.{name}\b|Group 'trainer' .* '{name}'", message):
                message = f"trainer.{name} is chosen by stu-train: leave it out"
        message = " ".join(message.split())
        try:
            super().error(message, ex)
        except SystemExit as error:
            raise ParseError(message) from error


class TrainCLI(LightningCLI):
    """Everything a run consists of: `model`, `datamodule`, `trainer`, and what to resume."""

    run_dir: Path
    resume_from: Path | None
    parallel: ParallelConfig
    arguments: Sequence[str]
    launch: Launch
    owner: RunOwner | None = None
    """This job's hold on `run_dir`; the first rank has it."""

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add none: `add_settings` has the seed, with a hyphen."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        add_settings(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.arguments = args
        self.config = parser.parse_args(args)
        _, _, self.parallel = check_run_settings(self.config, is_plan=False)

    def before_instantiate_classes(self) -> None:
        # First, as it may import DeepSpeed, whose memory is not the model's.
        self.writer = CheckpointWriter()
        self.strategy = make_strategy(self.parallel, self.writer)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        self.run_dir, self.resume_from = self.config_init.run_dir, None
        self.launch = detect_launch()
        prepare_blocks(self.model.model, self.parallel)
        if not is_first_rank(self.launch):
            return self._make_trainer(0, **kwargs)
        owner = RunOwner(self.run_dir)
        owner.claim(provenance(self.arguments))
        try:
            self.resume_from = self._choose()
            trainer = self._make_trainer(self._step(), **kwargs)
            self._compare(trainer)
            owner.note(
                resumes=str(self.resume_from or ""), changes=self.model.run_record["changes"]
            )
        except BaseException:
            owner.withdraw()
            raise
        self.owner = self.writer.owner = owner
        return trainer

    def follow(self, checkpoint: str | None) -> None:
        """Go on from the checkpoint that the first rank chose, if any; None: choose likewise."""
        if checkpoint is None:
            self.resume_from = self._choose()
        else:
            self.resume_from = Path(checkpoint) if checkpoint else None
        self._compare(self.trainer)

    def _make_trainer(self, start: int, **kwargs: Any) -> L.Trainer:
        settings, run_dir = self.config_init, self.run_dir
        folder = run_dir / CHECKPOINTS
        self.interruption = Interruption()
        self.trainer_defaults["callbacks"] = [
            StepProgress(),
            self.interruption,
            Watchdog(run_dir, settings.hang_minutes),
            Checkpoints(
                folder,
                self.writer,
                settings.checkpoint_every_steps,
                settings.checkpoint_every_minutes,
                settings.keep_checkpoints,
            ),
        ]
        if settings.log_samples:
            self.trainer_defaults["callbacks"].append(SampleLog(run_dir / "samples"))
        plugins: list[Any] = [FolderIO(self.writer)]
        if self.launch.kind != "alone":
            plugins.append(self.launch.environment())
        # Steps that the interrupted run logged after its checkpoint are about to come again.
        logger = TensorBoardLogger(run_dir, name="", version="tensorboard", purge_step=start + 1)
        trainer = super().instantiate_trainer(
            default_root_dir=run_dir,
            logger=logger,
            strategy=self.strategy,
            plugins=plugins,
            **FORCED,
            **kwargs,
        )
        self.launch.check(trainer.num_devices, trainer.num_nodes)
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            trainer.strategy._launcher = Launcher(
                launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
            )
        FitLoop.replace(trainer)
        # Lightning's own handler of SIGTERM would broadcast in it, whatever the ranks are at.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer

    def facts(self) -> dict[str, str]:
        """Return what must be the same for all ranks."""
        index = Path(self.config.data.dir) / INDEX_FILE
        return {
            **versions(),
            **flatten(self.config.as_dict()),
            f"the hash of {index}": hashlib.sha256(index.read_bytes()).hexdigest()[:16],
        }

    def _step(self) -> int:
        if self.resume_from is None:
            return 0
        step: int = CheckpointFolder(self.resume_from).training["global_step"]
        return step

    def _choose(self) -> Path | None:
        """Find the checkpoint to go on from, whole, and of this run if it has any."""
        resume, run_dir = self.config_init.resume, self.run_dir
        own = run_dir / CHECKPOINTS
        if resume == "auto":
            resume = "last" if any(own.glob("*.ckpt")) else None
        elif resume is None and own.exists():
            raise ValueError(
                f"run_dir={run_dir}: a run is there already; go on with --resume last, choose "
                "another run_dir, or delete it"
            )
        if resume is None:
            return None
        if resume == "last":
            return last_good_checkpoint(run_dir)
        path = Path(resume)
        if any(own.glob("*.ckpt")) and path.resolve().parent != own.resolve():
            raise ValueError(
                f"resume={path}: in run_dir={run_dir} is another run; give another run_dir"
            )
        verified_checkpoint(path)
        return path

    def _compare(self, trainer: L.Trainer) -> None:
        """Raise ValueError unless the run to go on with is the same, or was allowed to change."""
        given = result_settings(trainer, self.model, self.datamodule)
        names = self.config_init.allow_change or []
        allowed = {part.strip() for name in names for part in name.split(",")}
        source = provenance(self.arguments)
        schedule = {
            name: str(self.config_init.trainer[name.removeprefix("trainer.")]) for name in SCHEDULE
        }
        changes: list[dict[str, Any]] = []
        if self.resume_from is None:
            check_same({}, given, allowed)
        else:
            folder = CheckpointFolder(self.resume_from)
            saved = folder.training
            changed = check_same(saved_settings(saved), given, allowed)
            if any(name.startswith(MODEL) for name in changed):
                check_shapes(folder, self.model)
            self.model.is_optimizer_changed = any(name.startswith(OPTIMIZER) for name in changed)
            self.datamodule.accepted_changes = {
                name.removeprefix(DATA) for name in changed if name.startswith(DATA)
            }
            self.datamodule.load_state_dict(saved[type(self.datamodule).__qualname__])
            warn_of_differences(saved, schedule, source)
            step = saved["global_step"]
            changes = list(saved["stu"].get("changes", []))
            for name, (before, now) in changed.items():
                changes.append({"step": step, "name": name, "before": before, "now": now})
        self.model.run_record = {"provenance": source, "schedule": schedule, "changes": changes}

    @rank_zero_only
    def save_settings(self) -> None:
        """Write `config.yaml`, with which the run can be repeated, or resumed."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        settings = self.config.clone()
        settings.resume = settings.allow_change = None
        with new_file(self.run_dir / "config.yaml") as temporary:
            temporary.write_text(self.parser.dump(settings), encoding="utf-8")


def is_first_rank(launch: Launch) -> bool:
    """Whether this process is the first one of its run, which may have to start the others yet."""
    by_lightning: int = rank_zero_only.rank  # type: ignore[attr-defined]
    return launch.rank == by_lightning == int(os.environ.get("NODE_RANK") or 0) == 0


def add_settings(parser: LightningArgumentParser) -> None:
    """Every setting of a run."""
    parser.add_class_arguments(
        L.Trainer, "trainer", instantiate=False, sub_configs=True, skip=LEFT_OUT
    )
    parser.set_defaults({f"trainer.{name}": value for name, value in DEFAULTS.items()})
    parser.add_lightning_class_args(FlashSTUModule, "model")
    parser.add_lightning_class_args(TokenData, "data")
    parser.add_class_arguments(ParallelConfig, "parallel")
    # Users need not repeat what the shards say.
    parser.set_defaults({"model.config.vocab_size": 0})
    add = parser.add_argument
    add(
        "--seed-everything",
        type=bool | int,
        default=0,
        help="seed of the initial weights; true: a random one",
    )
    add("--run-dir", type=Path, default=Path("runs/train"), help="for checkpoints and logs")
    add(
        "--resume",
        type=str | None,
        help="`last`, a checkpoint to go on from, or `auto`: the last one, if there is any",
    )
    add(
        "--allow-change",
        action="append",
        help="settings, by name, that may differ from the checkpoint's: NAME[,NAME]",
    )
    add("--checkpoint-every-steps", type=int, default=1000, help="optimizer steps between them")
    add("--checkpoint-every-minutes", type=float, default=30.0, help="and at least so often")
    add("--keep-checkpoints", type=int, default=3, help="older ones are deleted")
    add("--hang-minutes", type=float, default=30.0, help="without a batch, until a run ends itself")
    add("--log-samples", type=bool, default=False, help="write which sample each step saw")


def parse_settings(arguments: Sequence[str]) -> Any:
    """The settings of a run that is not to begin: no data but the index is read, no model made.

    Raises UserError; exits with code 2 for arguments that cannot be parsed.
    """
    parser = Parser(prog="stu-plan")
    parser.add_argument("--config", action="config")
    add_settings(parser)
    settings = parser.parse_args(list(arguments))
    try:
        config, optimizer, parallel = check_run_settings(settings, is_plan=True)
    except ValueError as error:
        raise UserError(str(error)) from error
    settings.model.config, settings.model.optimizer, settings.parallel = config, optimizer, parallel
    return settings


def run(arguments: Sequence[str]) -> None:
    """Train as `arguments` say.

    Raises UserError for what can be found wrong before the first step, OSError if a file cannot be
    written; exits with code 2 for arguments that cannot be parsed.
    """
    # Lightning's hints are not for the users of this command.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.")
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed")
    warnings.filterwarnings("ignore", message=".*all_gather is deprecated, use torch.distributed")
    cli = _prepare(list(arguments))
    with owned(cli.owner):
        _fit(cli)


def _prepare(arguments: list[str]) -> TrainCLI:
    """Do all that can be refused, all ranks together; the first one owns the folder from then on.

    Raises UserError.
    """
    cli: TrainCLI | None = None
    try:
        start = Start(detect_launch())
        with start.together() as facts:
            try:
                cli = TrainCLI(
                    run=False,
                    args=arguments,
                    seed_everything_default=0,
                    auto_configure_optimizers=False,
                    load_from_checkpoint_support=False,
                    save_config_callback=None,
                    parser_class=Parser,
                    parser_kwargs={"prog": "stu-train"},
                )
            except MisconfigurationException as error:
                raise UserError(str(error)) from error
            facts |= cli.facts()
            if cli.owner is not None:
                start.tell("resume", str(cli.resume_from or ""))
        with start.together():
            if cli.owner is None:
                cli.follow(start.told("resume"))
            cli.save_settings()
        start.check_folder(cli.run_dir)
    except BaseException as error:
        if cli is not None and cli.owner is not None:
            cli.owner.withdraw()
        if isinstance(error, ValueError):
            raise UserError(str(error)) from error
        raise
    return cli


def _fit(cli: TrainCLI) -> None:
    trainer, model = cli.trainer, cli.model
    _tell(
        f"{model.model.num_parameters() / 1e6:,.1f} M parameters, "
        f"{cli.datamodule.samples_per_epoch * cli.datamodule.seq_len:,} tokens in an epoch, "
        f"{trainer.world_size} x {trainer.accelerator.name()}, everything goes to {cli.run_dir}"
    )
    for text in data_warnings(cli.config, trainer.world_size):
        _tell(f"warning: {text}")
    try:
        trainer.fit(model, datamodule=cli.datamodule, ckpt_path=cli.resume_from, weights_only=True)
    except TooManyBadSteps as error:
        _tell(f"stopped at step {trainer.global_step}: {error}")
        leave_group()
        raise SystemExit(TOO_MANY_BAD_STEPS) from error
    leave_group()
    if (received := cli.interruption.received) is not None:
        _tell(
            f"stopped at step {trainer.global_step} of {trainer.max_steps} for {received.name}; "
            "the checkpoint is written, and --resume last goes on"
        )
        raise SystemExit(EXIT_CODES[received])
    time_is_up = trainer.global_step < trainer.max_steps
    reason = f" (trainer.max_time={cli.config.trainer.max_time} is used up)" if time_is_up else ""
    _tell(
        f"trained to step {trainer.global_step} of {trainer.max_steps}{reason}; "
        f"next: stu-export {cli.run_dir} --output MODEL_DIR"
    )


@contextmanager
def owned(owner: RunOwner | None) -> Iterator[None]:
    """Give the run's folder free when the block ends, and note how."""
    how = "done"
    try:
        yield
    except BaseException as error:
        how = f"{type(error).__name__}: {error}"
        raise
    finally:
        if owner is not None:
            owner.end(how)


def leave_group() -> None:
    """Where all ranks end alike: a thread of gloo's that is at work when the interpreter ends
    would abort it, and the exit code be lost."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@rank_zero_only
def _tell(message: str) -> None:
    print(message, file=sys.stderr)
