"""Updates that are skipped, on all ranks alike."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

from stu.common.errors import UserError
from tests import forked
from tests.train.saved import load_checkpoint
from train import report
from train.callbacks.bad_steps import GuardConfig, StepGuard, TooManyBadSteps

STU_TRAIN = """
import math, sys, time
from train.checkpoint import writer as checkpoint_writer
from train import cli
from train import module
real, calls = module.next_token_loss, 0
def next_token_loss(*arguments):
    global calls
    calls += 1
    loss, nats = real(*arguments)
    if calls in {bad} and module_rank() == {rank}:
        loss = loss * math.{value}
    return loss, nats
def module_rank():
    from torch import distributed
    return distributed.get_rank() if distributed.is_initialized() else 0
module.next_token_loss = next_token_loss
really_write = checkpoint_writer.write_rank
def write_rank(*arguments):
    time.sleep({write_seconds})
    really_write(*arguments)
checkpoint_writer.write_rank = write_rank
sys.exit(cli.main(sys.argv[1:]))
"""


def run(
    settings, folder, tmp_path, ranks, stage, bad=(), value="nan", code=0, write_seconds=0, **more
):
    """`stu-train` in which these micro-batches of the last rank have no finite loss."""
    script = tmp_path / f"train-{folder.name}.py"
    wrong = {"bad": set(bad) or "()", "rank": ranks - 1, "value": value}
    script.write_text(STU_TRAIN.format(**wrong, write_seconds=write_seconds))
    values = {
        "trainer.devices": ranks,
        "data.micro_batch_size": 4 // ranks,
        "trainer.max_steps": 8,
        "run-dir": folder,
        **more,
    }
    if stage == "fsdp":
        values["parallel.kind"] = "fsdp"
    elif stage is not None:
        values |= {"parallel.kind": "zero", "parallel.zero_stage": stage}
    kept = [its for its in settings if its.split("=")[0][2:] not in values]
    command = [forked.python(), script, *kept, *(f"--{k}={v}" for k, v in values.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


@pytest.mark.parametrize(
    ("ranks", "stage", "value"),
    [
        (1, None, "nan"),
        (1, None, "inf"),
        (2, 3, "nan"),
        *(pytest.param(2, stage, "nan", marks=pytest.mark.slow) for stage in (None, 0, 1, 2)),
        *(pytest.param(2, stage, "inf", marks=pytest.mark.slow) for stage in (None, 3)),
    ],
)
def test_an_update_that_is_not_finite_is_skipped(settings, tmp_path, ranks, stage, value):
    """And the next is as good as any; both ranks know of it, of which one had the fault."""
    run_dir = tmp_path / "run"
    run(settings, run_dir, tmp_path, ranks, stage, bad={3}, value=value)
    saved = load_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 8
    assert saved["optimizer_step"] == 7
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())
    curves = report.read_curves(run_dir)
    assert curves["train/skipped_updates"][1] == [0, 0, *[1] * 6]
    assert not math.isfinite(curves["train/grad_norm"][1][2])
    seen = []
    for path in sorted((run_dir / "skipped").iterdir()):
        (line,) = path.read_text().splitlines()
        assert json.loads(line)["step"] == 3
        seen += json.loads(line)["samples"]
    assert len(seen) == len(set(seen)) == 4


@pytest.mark.parametrize(
    "stage",
    [None, 3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2, "fsdp"))],
)
def test_a_fault_before_the_last_micro_batch_of_a_step(settings, tmp_path, stage):
    """Gradients of one rank, which the others have not seen when it comes."""
    run_dir, more = tmp_path / "run", {"trainer.accumulate_grad_batches": 2, "trainer.max_steps": 4}
    run(settings, run_dir, tmp_path, 2, stage, bad={3}, **more)
    saved = load_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    assert (saved["global_step"], saved["optimizer_step"]) == (4, 3)
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())
    lines = [path.read_text() for path in sorted((run_dir / "skipped").iterdir())]
    assert [json.loads(line)["step"] for line in lines] == [2, 2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_many_end_the_run(settings, tmp_path, ranks):
    """With the last checkpoint, which was still being written."""
    more = {"model.guard.most_bad_steps": 3, "checkpoint-every-steps": 2, "write_seconds": 1}
    run_dir = tmp_path / "run"
    said = run(settings, run_dir, tmp_path, ranks, None, bad={4, 5, 6}, code=65, **more)
    assert "3 updates were skipped" in said
    assert "skipped has their samples" in said
    assert load_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"] == 4


def test_losses_that_jump():
    guard = StepGuard(GuardConfig(loss_jump=1.0))
    assert not any(guard.is_spike(9.0) for _ in range(20))  # too few to know
    assert not any(guard.is_spike(3.0 + 0.01 * number) for number in range(80))
    assert guard.is_spike(4.6)
    assert not guard.is_spike(4.2)
    assert not guard.is_spike(math.nan)
    assert not any(StepGuard(GuardConfig()).is_spike(loss) for loss in [*[1.0] * 100, 1e9])


def test_counting(tmp_path):
    guard = StepGuard(GuardConfig(most_bad_steps=2))
    guard.count(7, math.inf, [1, 2], tmp_path / "a" / "b.jsonl")
    with pytest.raises(TooManyBadSteps, match="2 updates were skipped"):
        guard.count(8, 2.0, [3], tmp_path / "a" / "b.jsonl")
    lines = (tmp_path / "a" / "b.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"step": 7, "loss": "inf", "samples": [1, 2]}


@pytest.mark.parametrize(
    ("name", "value"), [("loss_jump", -1), ("loss_jump", math.nan), ("most_bad_steps", 0)]
)
def test_settings_that_are_not_allowed(name, value):
    with pytest.raises(UserError, match=f"model.guard.{name}=.* is not allowed"):
        GuardConfig(**{name: value})


def test_a_jump_spoils_the_step(settings, tmp_path, monkeypatch):
    """The loss becomes NaN, and its update is skipped as such."""
    from train import cli

    monkeypatch.setattr(StepGuard, "is_spike", lambda self, nats: self._seen(nats), raising=False)
    seen = []

    def look(self, nats):
        seen.append(nats)
        return len(seen) == 3

    monkeypatch.setattr(StepGuard, "_seen", look, raising=False)
    arguments = [*settings, f"--run-dir={tmp_path / 'run'}", "--trainer.max_steps=5"]
    assert cli.main([*arguments, "--model.guard.loss_jump=1"]) == 0
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved["optimizer_step"] == 4
    assert all(torch.isfinite(its).all() for its in saved["state_dict"].values())
    assert all(math.isfinite(nats) for nats in seen)
