"""A run that is killed again and again ends like one that is never killed."""

import os
import random
import re
import subprocess
import threading

import pytest

from tests import forked
from tests.train.saved import assert_same_state, last_checkpoint, losses

KILLS = 20
STEPS = 600
SECONDS = 300


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(train, settings, tmp_path):
    """A checkpoint after every second step: about every second kill cuts one short."""
    more = [f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=200"]
    more.append("--checkpoint-every-steps=2")
    whole, killed = train(tmp_path / "whole", *more), tmp_path / "killed"
    chance = random.Random(0)
    command = [forked.program("stu-train"), *settings, *more, "--resume=auto"]
    command.append(f"--run-dir={killed}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(KILLS):
        with forked.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as run:
            watch = threading.Timer(SECONDS, run.kill)
            watch.start()
            first = next(line for line in run.stderr if re.match(r"step \d+/", line))
            assert int(first.split()[1].split("/")[0]) < STEPS - 50, "it would end by itself"
            threading.Timer(chance.uniform(0, 0.5), run.kill).start()
            run.stderr.read()
            watch.cancel()
        assert run.returncode == -9
    subprocess.run(command, check=True, timeout=SECONDS, env=environment)

    actual = last_checkpoint(killed)
    assert actual["global_step"] == STEPS
    assert_same_state(actual, last_checkpoint(whole))
    assert losses(killed) == losses(whole)
