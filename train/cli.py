"""`stu-train`: train a Flash-STU model on token shards."""

import argparse
import errno
import os
import socket
import sys
import traceback
from collections.abc import Sequence

from stu.common.errors import UserError, requires_extra
from train.start.signals import exiting_at_once

FAULT = 3
"""Exit code after a fault of the program or of the network; a job is then requeued."""

MAY_PASS = {
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, getattr(errno, "EREMOTEIO", errno.EIO)),
    *(errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN),
}
"""Errors of the system that a later start need not meet."""

# The settings that most runs use; `--help-all` describes all. A test compares both.
COMMON_SETTINGS = {
    "--config": "YAML file of settings; options to the right of it override it",
    "--data.dir": "Folder that stu-prepare wrote",
    "--data.weights": "Weights of the sources of a mixture, as in `{code: 3, web: 1}`",
    "--data.seq_len": "Number of input tokens per sample",
    "--data.micro_batch_size": "Number of samples that each rank processes at once",
    "--model.config": "YAML file of a model's shape, such as those in configs/model/",
    "--model.config.num_layers": "Number of layers; other fields of the shape are set likewise",
    "--model.optimizer.name": "Optimizer: `adamw`, `lion` or `muon`",
    "--model.optimizer.learning_rate": "Peak learning rate; other fields are set likewise",
    "--trainer.max_steps": "Number of optimizer steps, at which the learning-rate schedule ends",
    "--trainer.max_time": "Maximum training time, DD:HH:MM:SS, at which the schedule ends too",
    "--trainer.accumulate_grad_batches": "Micro-batches per optimizer step",
    "--trainer.gradient_clip_val": "Maximum norm of the gradients",
    "--trainer.val_check_interval": "Micro-batches between validations",
    "--run-dir": "Folder for checkpoints, logs and the record of jobs",
    "--resume": "Checkpoint to continue from: a path, `last`, or `auto` for the last if any",
    "--init-from": "Model directory or published checkpoint to fine-tune",
    "--init-tokens": "Embedding rows if the tokenizer changes: `same` (refused) or `by-bytes`",
    "--allow-change": "Settings that may differ from those of the checkpoint: NAME[,NAME]",
    "--logger": "Loggers, as in `[tensorboard, csv]`",
    "--checkpoint-every-steps": "Optimizer steps between checkpoints",
    "--checkpoint-every-minutes": "Maximum time between checkpoints",
    "--keep-checkpoints": "Number of most recent checkpoints to keep",
    "--parallel.kind": "Strategy: `ddp`, `zero` for DeepSpeed, or `fsdp`",
    "--parallel.zero_stage": "Stage of DeepSpeed's ZeRO: what is sharded across the ranks",
    "--evaluation.tasks": "Tasks to evaluate the model on: `needle,recall`, or lm-eval's",
    "--evaluation.every_steps": "Optimizer steps between evaluations; `evaluation.*` likewise",
    "--lora.r": "Rank of LoRA adapters to train instead of the model; other `lora.*` likewise",
    "--seed-everything": "Seed of the initial weights",
    "--print-config": "Print all settings as YAML, and exit",
    "--help-all": "Describe all settings, and exit",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code (docs/slurm.md lists all of them)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        _short_help().print_help()
        return 0
    with exiting_at_once():
        try:
            with requires_extra("train"):
                from jsonargparse import set_parsing_settings

                from stu.common.machine import limit_threads
                from train.run import run  # takes seconds

            limit_threads()

            if "--help-all" in arguments:  # reading the docstrings of fields takes 0.3 s
                set_parsing_settings(docstring_parse_attribute_docstrings=True)
            run(["--help" if argument == "--help-all" else argument for argument in arguments])
        except (UserError, OSError) as error:
            where = _this_rank(even_alone=False) if isinstance(error, OSError) else ""
            print(f"stu-train: error: {' '.join(str(error).split())}{where}", file=sys.stderr)
            return FAULT if _may_pass(error) else 2
        except Exception:
            traceback.print_exc()
            print(f"stu-train: a fault of the program{_this_rank()}", file=sys.stderr)
            return FAULT
    return 0


def _may_pass(error: BaseException | None) -> bool:
    """Return whether this is, or was caused by, an error of the network, or of a file system in it,
    which a later start need not meet."""
    if error is None:
        return False
    if isinstance(error, socket.gaierror):  # whose errno is of another kind
        return error.errno == socket.EAI_AGAIN
    is_of_network = isinstance(error, ConnectionError | TimeoutError)
    may_pass = is_of_network or getattr(error, "errno", None) in MAY_PASS
    return may_pass or _may_pass(error.__cause__)


def _this_rank(even_alone: bool = True) -> str:
    """Return this process's rank and host, to add to a message; nothing of a process that is alone,
    unless asked for."""
    from train.start.launch import detect_launch

    try:
        launch = detect_launch()
    except UserError:  # a launcher that is not supported
        return ""
    local = os.environ.get("LOCAL_RANK")
    if launch.num_ranks == 1 and local is None and not even_alone:
        return ""
    rank = launch.rank if launch.num_ranks > 1 else int(local or 0)
    return f", on rank {rank} on {socket.gethostname()}"


def _short_help() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stu-train",
        usage="stu-train --config FILE --data.dir DIR [--SETTING VALUE ...]",
        description="Train a Flash-STU model on token shards. The dotted name of a setting is its "
        "path in the YAML file.",
        add_help=False,
    )
    for name, text in COMMON_SETTINGS.items():
        parser.add_argument(name, metavar="", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
