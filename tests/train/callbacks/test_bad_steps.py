"""Harmful updates are skipped, on all ranks alike."""

import json
import math
from pathlib import Path

import pytest

from tests import forked
from tests.train.conftest import parallel, slow
from tests.train.saved import last_checkpoint
from train import report
from train.callbacks.bad_steps import GuardConfig, StepGuard, TooManyBadSteps

STU_TRAIN = """
import json, os, sys, threading
from torch import distributed
from train.callbacks.bad_steps import StepGuard, TooManyBadSteps
from train.checkpoint import writer as checkpoint_writer
from train import cli
from train import module
bad, bad_rank, value, late_step = json.loads(os.environ["BAD_LOSSES"])
next_token_loss, calls = module.next_token_loss, 0
def spoiled_loss(*arguments):
    global calls
    calls += 1
    loss, nats = next_token_loss(*arguments)
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    return loss * float(value) if calls in bad and rank == bad_rank else loss, nats
module.next_token_loss = spoiled_loss
count, has_given_up = StepGuard.count, threading.Event()
def count_and_tell(*arguments):
    try:
        count(*arguments)
    except TooManyBadSteps:
        has_given_up.set()
        raise
StepGuard.count = count_and_tell
write_rank = checkpoint_writer.write_rank
def write_late(folder, rank, share, path):
    assert path.name != f"step-{late_step:08}.ckpt" or has_given_up.wait(200)
    write_rank(folder, rank, share, path)
checkpoint_writer.write_rank = write_late
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def train_with_bad_losses(settings, tmp_path):
    """Function that runs `stu-train` where these micro-batches of the last rank have a bad loss.

    late_step: The step whose checkpoint is written only after the guard has given up.
    """

    def run(ranks, stage, bad, bad_value="nan", late_step=0, code=0, **more):
        script = tmp_path / "train.py"
        script.write_text(STU_TRAIN)
        values = {"trainer.devices": ranks, "data.micro_batch_size": 4 // ranks}
        values |= {"run-dir": tmp_path / "run", "trainer.max_steps": 8, **more}
        more_settings = (f"--{name}={value}" for name, value in (values | parallel(stage)).items())
        environment = {"PYTHONPATH": str(Path.cwd())}
        environment["BAD_LOSSES"] = json.dumps([bad, ranks - 1, bad_value, late_step])
        done = forked.run(forked.python(), script, *settings, *more_settings, **environment)
        assert done.returncode == code, done.stderr[-3000:]
        return tmp_path / "run", done.stderr

    return run


@pytest.mark.parametrize(
    ("ranks", "stage", "value", "accumulated"),
    [
        slow(1, None, "nan", 1),
        (1, None, "inf", 1),
        *(slow(2, stage, "nan", 1) for stage in (None, 0, 1, 2, 3)),
        *(slow(2, stage, "inf", 1) for stage in (None, 3)),
        # The bad micro-batch is the first of its step, and the other rank has not seen it.
        *((2, stage, "nan", 2) for stage in (None, 3)),
        *(slow(2, stage, "nan", 2) for stage in (0, 1, 2, "fsdp")),
    ],
)
def test_update_that_is_not_finite_is_skipped_on_all_ranks(
    train_with_bad_losses, ranks, stage, value, accumulated
):
    """The next updates are good."""
    steps, bad_step = (8, 3) if accumulated == 1 else (4, 2)
    more = {"trainer.accumulate_grad_batches": accumulated, "trainer.max_steps": steps}
    run, _ = train_with_bad_losses(ranks, stage, [3], value, **more)
    saved = last_checkpoint(run)
    assert (saved["global_step"], saved["optimizer_step"]) == (steps, steps - 1)
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())
    curves = report.read_curves(run)
    expected = [0] * (bad_step - 1) + [1] * (steps - bad_step + 1)
    assert curves["train/skipped_updates"][1] == expected
    assert not math.isfinite(curves["train/grad_norm"][1][bad_step - 1])
    samples = []
    for path in (run / "skipped").iterdir():
        (line,) = map(json.loads, path.read_text().splitlines())
        assert line["step"] == bad_step
        samples += line["samples"]
    assert len(samples) == len(set(samples)) == 4 * accumulated


@pytest.mark.parametrize("ranks", [slow(1), 2])
def test_too_many_skipped_updates_end_the_run(train_with_bad_losses, ranks):
    """The last checkpoint, which is still being written, is completed."""
    more = {"model.guard.most_bad_steps": 3, "checkpoint-every-steps": 2, "late_step": 4}
    run, printed = train_with_bad_losses(ranks, None, [4, 5, 6], code=65, **more)
    assert "3 updates were skipped" in printed
    assert "skipped has their samples" in printed
    assert last_checkpoint(run)["global_step"] == 4


def test_loss_that_jumps_is_a_spike():
    guard = StepGuard(GuardConfig(loss_jump=1.0))
    assert not any(guard.is_spike(9.0) for _ in range(20))  # too few to know
    assert not any(guard.is_spike(3.0 + 0.01 * number) for number in range(80))
    assert guard.is_spike(4.6)
    assert not guard.is_spike(4.2)
    assert not guard.is_spike(math.nan)
    assert not any(StepGuard(GuardConfig()).is_spike(loss) for loss in [*[1.0] * 100, 1e9])


def test_skipped_updates_are_counted_and_recorded(tmp_path):
    guard = StepGuard(GuardConfig(most_bad_steps=2))
    guard.count(7, math.inf, [1, 2], tmp_path / "a" / "b.jsonl")
    with pytest.raises(TooManyBadSteps, match="2 updates were skipped"):
        guard.count(8, 2.0, [3], tmp_path / "a" / "b.jsonl")
    lines = (tmp_path / "a" / "b.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 7, "loss": "inf", "samples": [1, 2]}


def test_update_of_a_spike_is_skipped(train, tmp_path, monkeypatch):
    seen = []

    def is_spike(guard, nats):
        seen.append(nats)
        return len(seen) == 3

    monkeypatch.setattr(StepGuard, "is_spike", is_spike)
    run = train(tmp_path / "run", "--trainer.max_steps=5", "--model.guard.loss_jump=1")
    saved = last_checkpoint(run)
    assert saved["optimizer_step"] == 4
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())
    assert all(math.isfinite(nats) for nats in seen)
