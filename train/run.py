"""One training run: from command-line arguments to a trained model."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only

from stu.common.errors import UserError
from stu.common.files import new_file
from train.callbacks.bad_steps import TooManyBadSteps
from train.callbacks.interruption import Interruption
from train.callbacks.progress import SampleLog, StepProgress
from train.callbacks.watchdog import Watchdog
from train.checkpoint.callback import Checkpoints
from train.checkpoint.folder import CHECKPOINTS, CheckpointFolder
from train.checkpoint.folder_io import FolderIO
from train.checkpoint.resume import choose_checkpoint
from train.checkpoint.writer import CheckpointWriter
from train.config import check_settings, check_validation_share, chosen_accelerator
from train.data.mixture import index_hashes
from train.fit_loop import FitLoop
from train.loggers import make_loggers
from train.notes import data_notes
from train.parallel.config import ParallelConfig, make_strategy, prepare_blocks
from train.same_run import SCHEDULE, compare
from train.settings import FORCED, Parser, add_settings, parse
from train.start.agreement import Start, flatten
from train.start.launch import Launch, detect_launch, is_first_rank
from train.start.launcher import Launcher
from train.start.messages import choose_messages
from train.start.owner import RunOwner, owned
from train.start.provenance import code_versions, provenance
from train.start.signals import EXIT_CODES
from train.tasks.callback import TaskEvaluation
from train.tuning.start import begin

TOO_MANY_BAD_STEPS = 65
"""Exit code after too many bad steps (sysexits' EX_DATAERR)."""


def run(arguments: Sequence[str]) -> None:
    """Train as `arguments` say.

    Raises UserError for mistakes that are found before the first step, and OSError if a file cannot
    be written; exits with code 2 for arguments that cannot be parsed.
    """
    choose_messages()
    cli = _prepare(list(arguments))
    with owned(cli.owner):
        _fit(cli)


class TrainCLI(LightningCLI):
    """The parts of a run, built from its settings: `model`, `datamodule` and `trainer`."""

    run_dir: Path
    resume_from: Path | None
    """Checkpoint to continue from."""
    parallel: ParallelConfig
    source: dict[str, Any]
    """Where the results of this job come from."""
    launch: Launch
    owner: RunOwner | None = None
    """Ownership of `run_dir` by this job; on the first rank only."""

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add none: `add_settings` has the seed, with a hyphen."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        assert isinstance(parser, Parser)
        add_settings(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        assert isinstance(parser, Parser)
        self.config = parse(parser, args)
        self.source = provenance(args)
        _, _, self.parallel, _ = check_settings(self.config, is_plan=False)

    def before_instantiate_classes(self) -> None:
        # First, as this may import DeepSpeed, whose memory is not counted as the model's.
        self.writer = CheckpointWriter()
        self.strategy = make_strategy(self.parallel, self.writer, self.config.trainer.accelerator)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        self.run_dir, self.resume_from = self.config_init.run_dir, None
        self.launch = detect_launch()
        prepare_blocks(self.model.model, self.parallel)
        self.datamodule.ranks_per_sample = self.parallel.context
        if not is_first_rank(self.launch):
            return self._make_trainer(0, **kwargs)
        owner = RunOwner(self.run_dir)
        owner.claim(self.source)
        try:
            self.resume_from = choose_checkpoint(self.run_dir, self.config_init.resume)
            trainer = self._make_trainer(self._step(), **kwargs)
            begun = self._compare(trainer)
            changes = self.model.run_record["changes"]
            owner.note(resumes=str(self.resume_from or ""), changes=changes, **begun)
        except BaseException:
            owner.withdraw()
            raise
        self.owner = self.writer.owner = owner
        return trainer

    def follow(self, checkpoint: str | None) -> None:
        """Continue from the checkpoint that the first rank chose: its path, or empty for a new run.

        checkpoint: None if the first rank could not be asked; this rank then chooses likewise.
        """
        if checkpoint is None:
            self.resume_from = choose_checkpoint(self.run_dir, self.config_init.resume)
        else:
            self.resume_from = Path(checkpoint) if checkpoint else None
        self._compare(self.trainer)

    def facts(self) -> dict[str, str]:
        """Return what must be the same on all ranks."""
        hashes = index_hashes(Path(self.config.data.dir))
        return {**code_versions(), **flatten(self.config.as_dict()), **hashes}

    @rank_zero_only
    def save_settings(self) -> None:
        """Write `config.yaml`, with which the run can be repeated or resumed, and begin to log."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        settings = self.config.clone()
        settings.resume = settings.allow_change = None
        with new_file(self.run_dir / "config.yaml") as temporary:
            temporary.write_text(self.parser.dump(settings), encoding="utf-8")
        loggers: list[Any] = self.trainer.loggers
        for logger in loggers:
            logger.start(flatten(self.config.as_dict()))

    def _make_trainer(self, step: int, **kwargs: Any) -> L.Trainer:
        settings, run_dir = self.config_init, self.run_dir
        self.interruption = Interruption()
        watchdog = Watchdog(run_dir, settings.hang_minutes)
        self.evaluation = TaskEvaluation(
            settings.evaluation, settings.lora, run_dir, self.interruption, watchdog
        )
        self.trainer_defaults["callbacks"] = [
            StepProgress(),
            self.interruption,
            watchdog,
            self.evaluation,
            Checkpoints(
                run_dir / CHECKPOINTS,
                self.writer,
                settings.checkpoint_every_steps,
                settings.checkpoint_every_minutes,
                settings.keep_checkpoints,
            ),
        ]
        if settings.log_samples:
            self.trainer_defaults["callbacks"].append(SampleLog(run_dir / "samples"))
        names = settings.logger if is_first_rank(self.launch) else []
        plugins: list[Any] = [FolderIO(self.writer)]
        if self.launch.kind != "alone":
            plugins.append(self.launch.environment())
        kwargs |= chosen_accelerator(settings.trainer)
        trainer = super().instantiate_trainer(
            default_root_dir=run_dir,
            logger=make_loggers(names, run_dir, step + 1),
            strategy=self.strategy,
            plugins=plugins,
            **FORCED,
            **kwargs,
        )
        self.launch.check(trainer.num_devices, trainer.num_nodes)
        self.parallel.check_ranks(trainer.num_devices * trainer.num_nodes)
        groups = trainer.num_devices * trainer.num_nodes // self.parallel.context
        check_validation_share(settings.trainer.limit_val_batches, self.datamodule, groups)
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            trainer.strategy._launcher = Launcher(
                launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
            )
        FitLoop.replace(trainer)
        # Lightning's handler of SIGTERM broadcasts, even if the other ranks are elsewhere.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer

    def _step(self) -> int:
        path = self.resume_from
        return 0 if path is None else int(CheckpointFolder(path).training["global_step"])

    def _compare(self, trainer: L.Trainer) -> dict[str, Any]:
        """Raise UserError for a resume that changes the run; return what the run began with."""
        names = self.config_init.allow_change or []
        allowed = {part.strip() for name in names for part in name.split(",")}
        schedule = {
            name: str(self.config_init.trainer[name.removeprefix("trainer.")]) for name in SCHEDULE
        }
        changes = compare(
            self.resume_from, trainer, self.model, self.datamodule, allowed, schedule, self.source
        )
        is_first = is_first_rank(self.launch)
        begun = begin(self.model.model, self.resume_from, self.config, is_first)
        record = {"provenance": self.source, "schedule": schedule, "changes": changes}
        self.model.run_record = record | begun
        return begun


def _prepare(arguments: list[str]) -> TrainCLI:
    """Build the run, all ranks together, and check all that can be refused. The first rank owns the
    folder afterwards.

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
                    parser_kwargs={
                        "prog": "stu-train",
                        "usage": "stu-train --config FILE --data.dir DIR [--SETTING VALUE ...]",
                        "description": "All settings. A dotted name is its path in the YAML file.",
                    },
                )
            except MisconfigurationException as error:
                raise UserError(message=str(error)) from error
            facts |= cli.facts()
            if cli.owner is not None:
                start.share("resume", str(cli.resume_from or ""))
        with start.together():
            if cli.owner is None:
                cli.follow(start.shared("resume"))
            else:
                cli.evaluation.prepare(cli.model.config, cli.datamodule.tokenizer_path)
            cli.save_settings()
        start.check_folder(cli.run_dir)
    except BaseException:
        if cli is not None and cli.owner is not None:
            cli.owner.withdraw()
        raise
    return cli


def _fit(cli: TrainCLI) -> None:
    trainer, model = cli.trainer, cli.model
    _print(
        f"{model.model.num_parameters() / 1e6:,.1f} M parameters, "
        f"{cli.datamodule.samples_per_epoch * cli.datamodule.seq_len:,} tokens in an epoch, "
        f"{trainer.world_size} x {trainer.accelerator.name()}, everything goes to {cli.run_dir}"
    )
    if trainer.is_global_zero:
        for text in data_notes(cli.datamodule, cli.config, trainer.world_size):
            _print(text)
    try:
        trainer.fit(model, datamodule=cli.datamodule, ckpt_path=cli.resume_from, weights_only=True)
    except TooManyBadSteps as error:
        _print(f"stopped at step {trainer.global_step}: {error}")
        leave_group()
        raise SystemExit(TOO_MANY_BAD_STEPS) from error
    leave_group()
    if (received := cli.interruption.received) is not None:
        _print(
            f"stopped at step {trainer.global_step} of {trainer.max_steps} for {received.name}; "
            "the checkpoint is written, and --resume last continues from it"
        )
        raise SystemExit(EXIT_CODES[received])
    for name, count in cli.datamodule.epochs_read.items():
        _print(f"{name}: read {count:.2f} times")
    time_is_up = trainer.global_step < trainer.max_steps
    reason = f" (trainer.max_time={cli.config.trainer.max_time} is used up)" if time_is_up else ""
    _print(
        f"trained to step {trainer.global_step} of {trainer.max_steps}{reason}; "
        f"next: stu-export {cli.run_dir} --output MODEL_DIR"
    )


def leave_group() -> None:
    """Leave the process group, where all ranks end alike.

    A thread of gloo that works while the interpreter ends would abort it and lose the exit code.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@rank_zero_only
def _print(message: str) -> None:
    print(message, file=sys.stderr)
