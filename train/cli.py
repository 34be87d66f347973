"""`stu-train`: train a Flash-STU model on token shards."""

import argparse
import sys
from collections.abc import Sequence

from train.start.signals import exiting_at_once

# What most runs set; `--help-all` lists every setting. A test holds these to the real parser.
COMMON_SETTINGS = {
    "--config": "YAML file of settings; what stands further right overrides it",
    "--data.dir": "folder that stu-prepare made",
    "--data.seq_len": "tokens the model reads in one sample",
    "--data.micro_batch_size": "samples each rank computes at once",
    "--model.config": "YAML file with the model's shape, as in configs/model/",
    "--model.config.num_layers": "or any other field of the shape",
    "--model.optimizer.learning_rate": "or any other field of the optimizer",
    "--trainer.max_steps": "optimizer steps in all; the learning-rate schedule ends there",
    "--trainer.max_time": "DD:HH:MM:SS of training in all; the schedule ends with it too",
    "--trainer.accumulate_grad_batches": "micro-batches in one optimizer step",
    "--trainer.gradient_clip_val": "norm that gradients are clipped to",
    "--trainer.val_check_interval": "micro-batches between validations",
    "--run-dir": "folder for checkpoints and logs",
    "--resume": "`last`, `auto` (the last, if there is any), or a checkpoint, to go on from",
    "--allow-change": "names of settings that may differ from those of the checkpoint",
    "--checkpoint-every-steps": "optimizer steps between checkpoints",
    "--checkpoint-every-minutes": "and at least so often",
    "--parallel.kind": "`ddp`, `zero` for DeepSpeed, or `fsdp`",
    "--parallel.zero_stage": "what DeepSpeed divides among the ranks",
    "--keep-checkpoints": "how many to keep, the newest ones",
    "--seed-everything": "decides the initial weights",
    "--print-config": "print all settings as YAML, and stop",
    "--help-all": "describe all settings, and stop",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 when done, 2 after an error of the user's or the system's."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"-h", "--help"} & set(arguments):
        _short_help().print_help()
        return 0
    with exiting_at_once():
        # Imported late, for it takes seconds.
        from train.run import run
        from train.start.agreement import UserError

        try:
            run(["--help" if argument == "--help-all" else argument for argument in arguments])
        except (UserError, OSError) as error:
            print(f"stu-train: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
    return 0


def _short_help() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stu-train",
        usage="stu-train --config FILE --data.dir DIR [--SETTING VALUE ...]",
        description="Train a Flash-STU model on token shards. A setting's name is its place in the "
        "YAML file.",
        add_help=False,
    )
    for name, text in COMMON_SETTINGS.items():
        parser.add_argument(name, metavar="", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
