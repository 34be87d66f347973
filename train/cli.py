"""`stu-train`: train a model on token shards."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning as L

# The settings most runs touch; `--help-all` lists every one.
COMMON_SETTINGS = {
    "--config": "YAML file of settings; later ones override earlier ones",
    "--data.dir": "folder that stu-prepare made",
    "--data.seq_len": "tokens the model reads in one sample",
    "--data.micro_batch_size": "samples each rank computes at once",
    "--model.config": "YAML file of the model's shape, as in configs/model/",
    "--model.config.num_layers": "or any other field of the shape by its name",
    "--model.optimizer.learning_rate": "or any other field of the optimizer",
    "--run_dir": "folder for logs and checkpoints",
    "--resume": "`last`, or a checkpoint to go on from",
    "--checkpoint_every_steps": "optimizer steps between checkpoints",
    "--seed_everything": "of the initial weights",
    "--trainer.max_steps": "optimizer steps in all; the schedule ends there",
    "--trainer.max_time": "DD:HH:MM:SS after which to stop and save",
    "--trainer.accumulate_grad_batches": "micro-batches of one optimizer step",
    "--trainer.gradient_clip_val": "norm that gradients are clipped to",
    "--trainer.val_check_interval": "steps between validations",
    "--print_config": "print all settings in effect as YAML, and stop",
    "--help-all": "describe all settings, and stop",
}

# Of the trainer: the stream of samples divides itself among ranks and has no end and no epochs,
# and a run's folder holds all its files.
OWN_SETTINGS: dict[str, Any] = {
    "check_val_every_n_epoch": None,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "limit_train_batches": None,
    "max_epochs": -1,
    "overfit_batches": 0.0,
    "reload_dataloaders_every_n_epochs": 0,
    "use_distributed_sampler": False,
}
FOLDER_SETTINGS = ["default_root_dir", "logger", "plugins"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 when done, 2 after an error that the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        _short_help().print_help()
        return 0
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    try:
        _train(arguments)
    except (ValueError, OSError) as error:
        print(f"stu-train: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _short_help() -> argparse.ArgumentParser:
    """Without importing torch and Lightning, which takes seconds."""
    parser = argparse.ArgumentParser(
        prog="stu-train",
        usage="stu-train --config FILE [--SETTING VALUE ...]",
        description="Train a Flash-STU model. A setting's name is its place in the YAML file.",
    )
    for name, text in COMMON_SETTINGS.items():
        parser.add_argument(name, metavar="", help=text)
    return parser


def _train(arguments: list[str]) -> None:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.loggers import TensorBoardLogger

    from stu.arguments import ArgumentParser
    from train import callbacks, checkpoints
    from train.data import TokenData
    from train.module import FlashSTUModule

    _quiet_lightning()

    class Parser(ArgumentParser, LightningArgumentParser):
        """Lightning's parser, with our errors."""

    class TrainCLI(LightningCLI):
        """Settings of model, data and trainer, and where a run's files go."""

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            add = parser.add_argument
            add("--run_dir", type=Path, default=Path("runs/train"), help="logs and checkpoints")
            add("--resume", type=str | None, help="`last`, or a checkpoint to go on from")
            add("--checkpoint_every_steps", type=int, default=1000, help="steps between them")
            add("--keep_checkpoints", type=int, default=2, help="older ones are deleted")

        def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
            parser: LightningArgumentParser = super().init_parser(prog="stu-train", **kwargs)
            return parser

        def instantiate_trainer(self, **kwargs: Any) -> "L.Trainer":
            _refuse_own_settings(self.config_init["trainer"], self.parser.get_defaults().trainer)
            run_dir: Path = self.config_init["run_dir"]
            self.resume_from = _checkpoint_to_resume(self.config_init["resume"], run_dir)
            periodic = checkpoints.periodic_checkpoints(
                run_dir,
                self.config_init["checkpoint_every_steps"],
                self.config_init["keep_checkpoints"],
            )
            self.trainer_defaults["callbacks"] = [
                callbacks.Throughput(),
                callbacks.StepProgress(),
                periodic,
            ]
            return super().instantiate_trainer(
                default_root_dir=run_dir,
                logger=TensorBoardLogger(run_dir, name="", version="tensorboard"),
                plugins=[checkpoints.DurableCheckpointIO()],
                **OWN_SETTINGS,
                **kwargs,
            )

    cli = TrainCLI(
        FlashSTUModule,
        TokenData,
        run=False,
        args=arguments,
        parser_class=Parser,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"max_steps": 10_000, "gradient_clip_val": 1.0, "log_every_n_steps": 10},
    )
    model, data, trainer = cli.model, cli.datamodule, cli.trainer
    model.check(data, trainer.max_steps)
    trainer.fit(model, datamodule=data, ckpt_path=cli.resume_from, weights_only=True)
    if trainer.state.finished:
        checkpoints.save_last(trainer)
    if trainer.state.finished and trainer.is_global_zero:
        print(
            f"trained for {trainer.global_step} steps; everything is in {trainer.default_root_dir}"
        )


def _quiet_lightning() -> None:
    """Drop hints that do not concern a user of this command."""
    import logging
    import warnings

    for package in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{package}").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # What validation logs is summed over the ranks already.
    warnings.filterwarnings("ignore", message="It is recommended to use .self.log.'val/")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.")


def _refuse_own_settings(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for name in [*OWN_SETTINGS, *FOLDER_SETTINGS]:
        if given[name] != defaults[name]:
            raise ValueError(f"trainer.{name} is chosen by stu-train: leave it out")


def _checkpoint_to_resume(resume: str | None, run_dir: Path) -> Path | None:
    from train.checkpoints import last_checkpoint

    if resume == "last":
        return last_checkpoint(run_dir)
    if resume is not None:
        if not Path(resume).is_file():
            raise ValueError(f"resume={resume}: no such file; give `last` or a checkpoint")
        return Path(resume)
    if run_dir.exists() and any(run_dir.iterdir()):
        raise ValueError(
            f"run_dir={run_dir}: a run is there already; go on with --resume last, choose another "
            "run_dir, or delete it"
        )
    return None


if __name__ == "__main__":
    sys.exit(main())
