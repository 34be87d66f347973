"""Runs of several ranks, with settings that give equal results however the model is divided."""

from pathlib import Path

import pytest

from tests import forked
from tests.train.conftest import parallel

STEPS, SAVED = 8, 4
SAMPLES = 8
"""Samples of a step, over all ranks and micro-batches."""


def arguments(folder, ranks, stage):
    """Return settings with two micro-batches a step, in which the first steps' gradients are
    clipped."""
    values = {
        "trainer.devices": ranks,
        "trainer.accumulate_grad_batches": 2,
        "data.micro_batch_size": SAMPLES // (2 * ranks),
        "trainer.gradient_clip_val": 1.5,
        "trainer.val_check_interval": 8,
        "trainer.max_steps": STEPS,
        "checkpoint-every-steps": SAVED,
        "run-dir": folder,
    }
    return [f"--{name}={value}" for name, value in (values | parallel(stage)).items()]


@pytest.fixture(scope="session")
def run(settings):
    """Function that runs `stu-train` in processes of its own, and returns the folder."""

    def run(folder, ranks, stage, *more, command=None):
        command = command or [forked.program("stu-train")]
        command = [*command, *settings, *arguments(folder, ranks, stage), *more]
        done = forked.run(*command, PYTHONPATH=str(Path.cwd()))
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    return run


@pytest.fixture(scope="session")
def run_alone(train):
    """Function that trains in this process, without DeepSpeed, and returns the folder."""
    return lambda folder, *more: train(folder, *arguments(folder, 1, None), *more)
