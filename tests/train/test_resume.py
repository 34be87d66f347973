"""A run that stops and goes on equals one that never stopped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train import cli, report
from train.callbacks import StepProgress
from train.checkpoints import load_checkpoint

STEPS = 40
"""At 2 samples a step, past the end of the first epoch."""


@pytest.fixture
def train(settings, tmp_path):
    """Run `stu-train`; stopping early keeps the schedule, as a time limit would."""

    def run(folder, *arguments):
        common = [*settings, f"--run_dir={tmp_path / folder}", f"--trainer.max_steps={STEPS}"]
        assert cli.main([*common, *map(str, arguments)]) == 0
        return tmp_path / folder

    return run


def losses(run):
    steps, values = report.read_curves(run)["train/loss"]
    return dict(zip(steps, values, strict=True))


def state(run):
    return load_checkpoint(run / "checkpoints" / "last.ckpt")


def assert_same_state(actual, expected):
    assert actual["global_step"] == expected["global_step"]
    assert actual["TokenData"] == expected["TokenData"]
    for name, weight in expected["state_dict"].items():
        assert torch.equal(actual["state_dict"][name], weight), name
    for before, after in zip(
        expected["optimizer_states"][0]["state"].values(),
        actual["optimizer_states"][0]["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stop", [3, 5, 32])
def test_losses_and_weights_are_bit_equal(train, stop):
    """Stopped between validations, right at one, and in the second epoch."""
    whole = train("whole", f"--checkpoint_every_steps={stop}")
    checkpoint = whole / "checkpoints" / f"step-{stop:08d}.ckpt"
    if not checkpoint.exists():  # only the newest are kept
        train("early", f"--checkpoint_every_steps={stop}", "--keep_checkpoints=100")
        checkpoint = whole.parent / "early" / "checkpoints" / f"step-{stop:08d}.ckpt"
    samples_per_epoch = state(whole)["TokenData"]["position"] / 2
    assert samples_per_epoch == STEPS
    resumed = train("resumed", f"--resume={checkpoint}")
    expected = {step: loss for step, loss in losses(whole).items() if step >= stop}
    assert losses(resumed) == expected
    assert len(expected) == STEPS - stop
    assert_same_state(state(resumed), state(whole))


def test_resume_last_in_the_same_folder(train, monkeypatch):
    whole = train("whole")

    def stop_at_seven(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 7  # what a time limit does, at a known step

    with monkeypatch.context() as stopping:
        stopping.setattr(StepProgress, "on_train_batch_end", stop_at_seven)
        parts = train("parts")
    assert state(parts)["global_step"] == 7
    assert train("parts", "--resume=last") == parts
    assert losses(parts) == losses(whole)
    assert_same_state(state(parts), state(whole))


@pytest.mark.parametrize("name", ["seed=5", "seq_len=8"])
def test_another_order_of_samples_is_refused(train, settings, tmp_path, capsys, name):
    run = train("run", "--trainer.max_steps=2")
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    arguments = [*settings, f"--run_dir={run}", "--resume=last", f"--data.{name}"]
    assert cli.main([*arguments, "--trainer.max_steps=4"]) == 2
    assert f"data.{name.split('=')[0]} is" in capsys.readouterr().err
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("damage", ["truncate", "garbage"])
def test_a_damaged_checkpoint_is_named(train, settings, capsys, damage):
    run = train("run", "--trainer.max_steps=1")
    file = run / "checkpoints" / "last.ckpt"
    file.write_bytes(file.read_bytes()[:-100] if damage == "truncate" else os.urandom(1000))
    arguments = [*settings, f"--run_dir={run}", "--resume=last", "--trainer.max_steps=2"]
    assert cli.main(arguments) == 2
    assert "last.ckpt: cut short, or not a checkpoint" in capsys.readouterr().err


def test_two_ranks_equal_one_and_either_goes_on_as_the_other(train, settings, tmp_path):
    """The same global batch on other ranks: equal but for the order of float32 sums."""
    whole = train("whole")
    program = Path(sys.executable).with_name("stu-train")
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.micro_batch_size=1"]
    common = [program, *settings, *ranks, f"--run_dir={tmp_path / 'two'}"]
    command = [*common, f"--trainer.max_steps={STEPS}", "--checkpoint_every_steps=11"]
    subprocess.run(command, check=True, timeout=300)
    two = tmp_path / "two"
    train("one", f"--resume={two / 'checkpoints' / 'step-00000033.ckpt'}")
    for other in (two, tmp_path / "one"):
        assert state(other)["TokenData"] == state(whole)["TokenData"]
        for name, weight in state(whole)["state_dict"].items():
            torch.testing.assert_close(state(other)["state_dict"][name], weight, rtol=0, atol=1e-4)
    # Means over the whole validation on all ranks, not of one rank's share.
    expected = report.read_curves(whole)["val/bits_per_byte"]
    actual = report.read_curves(two)["val/bits_per_byte"]
    assert actual[0] == expected[0]
    assert actual[1] == pytest.approx(expected[1], rel=1e-4)
