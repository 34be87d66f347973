"""A run that is killed again and again ends where one ends that is not."""

import os
import random
import re
import subprocess
import threading

import pytest
import torch

from tests import forked
from tests.train.saved import load_checkpoint
from train import cli, report

KILLS = 20
STEPS = 600
SECONDS = 300


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(settings, tmp_path):
    """A checkpoint after every second step: about every second kill cuts one short."""
    changed = {"trainer.max_steps": STEPS, "trainer.val_check_interval": 200}
    changed["checkpoint-every-steps"] = 2
    replaced = {f"--{name}" for name in changed}
    arguments = [its for its in settings if its.split("=")[0] not in replaced]
    arguments += [f"--{name}={value}" for name, value in changed.items()]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.main([*arguments, f"--run-dir={whole}"]) == 0

    chance = random.Random(0)
    command = [forked.program("stu-train"), *arguments, "--resume=auto"]
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

    actual, expected = (
        load_checkpoint(run / "checkpoints" / "last.ckpt") for run in (killed, whole)
    )
    assert actual["global_step"] == STEPS
    assert actual["TokenData"] == expected["TokenData"]
    for name, weight in expected["state_dict"].items():
        assert torch.equal(actual["state_dict"][name], weight), name
    moments = [its["optimizer_states"][0]["state"] for its in (actual, expected)]
    for mine, other in zip(*(its.values() for its in moments), strict=True):
        assert all(torch.equal(mine[kind], other[kind]) for kind in other)
    assert report.read_curves(killed)["train/loss"] == report.read_curves(whole)["train/loss"]
