"""A run that stops and continues equals one that never stopped."""

import csv
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Timer

from stu.common.errors import UserError
from tests import forked
from tests.train.saved import (
    assert_same_state,
    checkpoint,
    last_checkpoint,
    load_checkpoint,
    losses,
)
from train import cli, report
from train.callbacks.progress import StepProgress
from train.checkpoint import callback as checkpoints
from train.checkpoint import export
from train.checkpoint import writer as checkpoint_writer
from train.checkpoint.folder import write_rank, write_training
from train.checkpoint.resume import verified_checkpoint
from train.data.loader import TokenData
from train.evaluation import ValidationSums
from train.loggers.files import TensorBoard
from train.optimizer import OptimizerConfig, learning_rate_factor
from train.start import provenance

pytestmark = pytest.mark.usefixtures("ordered_event_files")

STEPS = 100
"""At 2 samples a step, past the end of the first epoch."""
LONG = f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=25"
OLD_RECORD = ("model_config", "tokenizer", "num_files", "guard")
"""Parts of the record in checkpoints from before they had checksums."""
WARMED_UP = OptimizerConfig(warmup_steps=1)


@pytest.fixture(scope="module")
def long_run(train, tmp_path_factory):
    """A run of 100 steps with a checkpoint after every fifth, only to be read."""
    more = "--checkpoint-every-steps=5", "--keep-checkpoints=100"
    return train(tmp_path_factory.mktemp("long") / "run", *LONG, *more)


@pytest.fixture(scope="module")
def short_run(train, tmp_path_factory):
    """A run of 6 steps with checkpoints after 2, 4 and 6, only to be read."""
    more = "--trainer.max_steps=6", "--checkpoint-every-steps=2"
    return train(tmp_path_factory.mktemp("short") / "run", *more)


@pytest.fixture
def copied_run(short_run, tmp_path):
    """A copy of `short_run`."""
    return shutil.copytree(short_run, tmp_path / "run", symlinks=True)


def checkpoint_names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def rates(run):
    return report.read_curves(run)["train/lr"][1]


def job(run, number):
    return json.loads((run / "jobs" / f"{number:05d}.json").read_text())


def signal_at(step):
    """Return a hook that sends SIGUSR1 after a step."""

    def hook(self, trainer, *_):
        if trainer.global_step == step:
            signal.raise_signal(signal.SIGUSR1)

    return hook


def signal_in_validation(self, trainer, *_):
    if not trainer.sanity_checking:
        signal.raise_signal(signal.SIGUSR1)


@pytest.fixture
def signalled_validations(monkeypatch):
    """Context in which every validation receives SIGUSR1 before its first batch."""
    with monkeypatch.context() as stopping:
        stopping.setattr(StepProgress, "on_validation_start", signal_in_validation)
        for hook in ("on_validation_batch_end", "on_validation_end"):
            stopping.setattr(StepProgress, hook, lambda *_: None)
        yield stopping


@pytest.mark.parametrize("stop", [pytest.param(5, marks=pytest.mark.slow), 75, 90])
def test_resumed_losses_and_weights_are_bit_equal(train, long_run, data, tmp_path, stop):
    """Stopped between validations, right at one, and in the second epoch."""
    assert 2 * 75 < TokenData(str(data), 16, 2).samples_per_epoch < 2 * 90
    resumed = train(tmp_path / "run", *LONG, f"--resume={checkpoint(long_run, stop)}")
    expected = {step: loss for step, loss in losses(long_run).items() if step > stop}
    assert len(expected) == STEPS - stop
    assert losses(resumed) == expected
    assert_same_state(last_checkpoint(resumed), last_checkpoint(long_run))


def test_signal_saves_without_a_validation_and_the_run_continues(
    train, short_run, tmp_path, monkeypatch
):
    """There may be no time for a validation."""
    more = "--trainer.max_steps=6", "--trainer.val_check_interval=2"
    with monkeypatch.context() as stopping:
        stopping.setattr(StepProgress, "on_train_batch_end", signal_at(3))
        run = train(tmp_path / "run", *more, code=75)
    assert last_checkpoint(run)["global_step"] == 3
    assert report.read_curves(run)["val/loss"][0] == [2]
    train(run, *more, "--resume=last")
    assert losses(run) == losses(short_run)
    assert_same_state(last_checkpoint(run), last_checkpoint(short_run))


def test_time_limit_waits_for_the_end_of_an_optimizer_step(train, tmp_path, monkeypatch):
    """A checkpoint between two micro-batches would lose the gradients of the first."""
    more = ["--trainer.accumulate_grad_batches=3", "--trainer.max_steps=5"]
    more.append("--trainer.val_check_interval=25")
    whole = train(tmp_path / "whole", *more)

    def on_train_batch_end(timer, trainer, *_):
        timer.batches = getattr(timer, "batches", 0) + 1
        trainer.should_stop = timer.batches >= 5  # in the middle of the second step

    with monkeypatch.context() as stopping:
        stopping.setattr(Timer, "on_train_batch_end", on_train_batch_end)
        parts = train(tmp_path / "parts", *more, "--trainer.max_time=01:00:00:00")
    stopped = last_checkpoint(parts)
    assert (stopped["global_step"], stopped["TokenData"]["position"]) == (2, 12)
    assert report.read_curves(parts)["val/loss"][0][-1] == 2  # validated before it stopped
    train(parts, *more, "--resume=last")
    assert losses(parts) == losses(whole)
    assert_same_state(last_checkpoint(parts), last_checkpoint(whole))


def test_validation_before_the_first_step(train, tmp_path):
    more = "--trainer.accumulate_grad_batches=4", "--trainer.val_check_interval=2"
    run = train(tmp_path / "run", *more, "--trainer.max_steps=2")
    assert last_checkpoint(run)["global_step"] == 2


def test_auto_starts_a_run_and_finds_a_checkpoint_not_yet_called_last(
    train, copied_run, short_run, tmp_path
):
    assert last_checkpoint(train(tmp_path / "new", "--resume=auto", "--trainer.max_steps=1"))
    shutil.rmtree(checkpoint(copied_run, 6))
    (copied_run / "checkpoints" / "last.ckpt").unlink()
    train(copied_run, "--resume=auto", "--trainer.max_steps=6")
    assert_same_state(last_checkpoint(copied_run), last_checkpoint(short_run))


def test_a_checkpoint_may_be_copied_as_the_last(train, short_run, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    last = (short_run / "checkpoints" / "last.ckpt").resolve()
    shutil.copytree(last, checkpoints / "last.ckpt")
    step = last_checkpoint(short_run)["global_step"]
    run = train(tmp_path / "run", "--resume=auto", f"--trainer.max_steps={step + 1}")
    assert checkpoint_names(run) == ["last.ckpt", last.name, f"step-{step + 1:08d}.ckpt"]
    (checkpoints / "last.ckpt").unlink()
    shutil.copytree(last, checkpoints / "last.ckpt")  # beside the one that it is a copy of
    train(run, "--resume=auto", f"--trainer.max_steps={step + 1}")
    assert checkpoint_names(run) == ["last.ckpt", last.name, f"step-{step + 1:08d}.ckpt"]


def test_a_run_without_a_checkpoint_is_started_anew(train, tmp_path, capsys):
    (tmp_path / "run" / "checkpoints" / ".step-00000001.ckpt.tmp").mkdir(parents=True)
    train(tmp_path / "run", "--trainer.max_steps=1", code=2)
    assert "a run is there already; start it anew with --resume auto" in capsys.readouterr().err
    train(tmp_path / "run", "--trainer.max_steps=1", "--resume=auto")


def test_run_is_not_mixed_with_another(train, short_run, copied_run, capsys):
    last = short_run / "checkpoints" / "last.ckpt"
    train(copied_run, f"--resume={last}", "--trainer.max_steps=7", code=2)
    assert "holds another run" in capsys.readouterr().err
    own = copied_run / "checkpoints" / "last.ckpt"
    own.unlink()
    own.symlink_to("gone.ckpt")
    for step in (2, 4, 6):
        shutil.rmtree(checkpoint(copied_run, step))
    train(copied_run, "--resume=auto", "--trainer.max_steps=7", code=2)  # overwrites nothing
    assert "no checkpoints/last.ckpt" in capsys.readouterr().err


def test_checkpoint_that_cannot_be_deleted_does_not_end_the_run(train, tmp_path, monkeypatch):
    """Nor does what is left of it look like a checkpoint."""

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError("Directory not empty")
        for file in list(path.glob("*"))[:1]:
            file.unlink()

    monkeypatch.setattr(shutil, "rmtree", refuse)
    more = "--trainer.max_steps=3", "--checkpoint-every-steps=1", "--keep-checkpoints=1"
    run = train(tmp_path / "run", *more)
    assert last_checkpoint(run)["global_step"] == 3
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000003.ckpt"]


def test_saved_settings_resume_a_run(train, tmp_path, capsys):
    run = train(tmp_path / "run", "--trainer.max_steps=2")
    from_file = f"--config={run / 'config.yaml'}", "--trainer.max_steps=4", "--resume=last"
    assert cli.main(from_file) == 0
    warning = "\nwarning: trainer.max_steps=4, but the checkpoint was trained with 2: "
    assert warning in f"\n{capsys.readouterr().err}"
    assert last_checkpoint(run)["global_step"] == 4


def test_failed_save_leaves_the_last_checkpoint(train, copied_run, capsys, monkeypatch):
    save = torch.save

    def disk_full(contents, path):
        save({"a": torch.zeros(9)}, path)
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    before = checkpoint_names(copied_run)
    monkeypatch.setattr(torch, "save", disk_full)
    more = "--resume=last", "--trainer.max_steps=9", "--checkpoint-every-steps=1"
    train(copied_run, *more, code=2)
    error = capsys.readouterr().err
    assert "step-00000007.ckpt: could not be written" in error
    assert "Traceback" not in error
    assert checkpoint_names(copied_run) == before
    assert last_checkpoint(copied_run)["global_step"] == 6


def test_training_continues_while_a_checkpoint_is_written(train, tmp_path, monkeypatch):
    """It becomes the last one only when it is complete, and the next one waits for it."""
    write, may_write, names = checkpoint_writer.write_rank, threading.Event(), {}

    def write_slowly(*arguments):
        assert may_write.wait(60)
        write(*arguments)

    def look(self, trainer, *_):
        folder = Path(trainer.default_root_dir) / "checkpoints"
        names[trainer.global_step] = sorted(path.name for path in folder.glob("[!.]*"))
        if trainer.global_step == 5:
            may_write.set()

    more = ("--trainer.max_steps=8",)
    whole = train(tmp_path / "whole", *more)
    with monkeypatch.context() as slow:
        slow.setattr(checkpoint_writer, "write_rank", write_slowly)
        slow.setattr(StepProgress, "on_train_batch_end", look)
        run = train(tmp_path / "run", "--checkpoint-every-steps=3", *more)
    assert names[4] == names[5] == []
    assert names[7] == ["last.ckpt", "step-00000003.ckpt"]
    assert checkpoint_names(run) == ["last.ckpt", *(f"step-0000000{n}.ckpt" for n in (3, 6, 8))]
    assert_same_state(last_checkpoint(run), last_checkpoint(whole))
    early = load_checkpoint(checkpoint(run, 3))
    assert early["global_step"] == early["optimizer_step"] == 3
    again = train(tmp_path / "again", f"--resume={checkpoint(run, 3)}", *more)
    assert_same_state(last_checkpoint(again), last_checkpoint(whole))


def test_every_change_of_the_result_is_refused_by_name(train, short_run, data, tmp_path, capsys):
    training = short_run / "checkpoints" / "last.ckpt" / "training.pt"
    before = training.read_bytes()
    other = shutil.copytree(data, tmp_path / "other")
    tokens = bytearray((other / "train-00000.bin").read_bytes())
    tokens[2000] ^= 1
    (other / "train-00000.bin").write_bytes(tokens)
    for arguments, message in [
        # The optimizer's state carries its own learning rate, so the new one would be ignored.
        ("--model.optimizer.learning_rate=0.5", "learning_rate=0.5, .* trained with 0.01: "),
        ("--model.config.num_heads=4", "num_heads=4, .* trained with 2: "),
        ("--data.seed=5", "data.seed is 5"),
        ("--data.seq_len=8", "data.seq_len is 8"),
        ("--data.micro_batch_size=3", "samples_per_step is 3, .* with 2: .*change samples_per_ste"),
        ("--trainer.accumulate_grad_batches=2", "samples_per_step is 4, but .* with 2: "),
        ("--trainer.gradient_clip_val=3", "trainer.gradient_clip_val=3.0, but .* with 1.0: "),
        ("--model.z_loss=1e-4", "model.z_loss=0.0001, but .* with 0.0: "),
        ("--model.guard.loss_jump=2", "model.guard.loss_jump=2.0, but .* with 0.0: "),
        ("--trainer.precision=bf16-mixed", "trainer.precision='bf16-mixed', .* with '32-true': "),
        ("--model.optimizer.schedule=wsd", "model.optimizer.schedule='wsd', .* with 'cosine': "),
        (f"--data.dir={other}", "data.contents is '"),
        (
            "--allow-change=trainer.clip",
            '--allow-change="trainer.clip" is not allowed: it must be names of model',
        ),
        ("--allow-change=data.seed --data.seed=3 --model.z_loss=1", "error: model.z_loss=1.0, but"),
        (
            "--allow-change=model.config.width,data.seed --model.config.width=32 --data.seed=7",
            "make another model",
        ),
    ]:
        more = "--resume=last", "--trainer.max_steps=7"
        train(short_run, *more, *arguments.split(), code=2)
        assert re.search(message, capsys.readouterr().err), arguments
    assert training.read_bytes() == before
    assert [path.name for path in (short_run / "jobs").iterdir()] == ["00001.json"]


def test_allowed_change_is_made_and_recorded(train, copied_run, capsys):
    assert rates(copied_run)[-1] == pytest.approx(0.1 * 1e-2)
    train(
        copied_run,
        "--allow-change=model.optimizer.learning_rate,model.optimizer.weight_decay",
        *("--allow-change", "data.seed,samples_per_step", "--resume=last"),
        *("--model.optimizer.learning_rate=0.5", "--model.optimizer.weight_decay=0.25"),
        *("--data.seed=7", "--data.micro_batch_size=4", "--trainer.max_steps=9"),
    )
    assert "the checkpoint was trained with 6" in capsys.readouterr().err
    assert rates(copied_run)[6] == pytest.approx(0.5 * learning_rate_factor(6, 9, WARMED_UP))
    assert rates(copied_run)[-1] == pytest.approx(0.1 * 0.5)
    saved, recorded = last_checkpoint(copied_run), job(copied_run, 2)["changes"]
    groups = saved["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
    assert saved["TokenData"]["position"] == 2 * 6 + 4 * 3
    assert saved["stu"]["changes"] == recorded
    assert {change["step"] for change in recorded} == {6}
    changes = {change["name"]: (change["before"], change["now"]) for change in recorded}
    assert changes["model.optimizer.learning_rate"] == (0.01, 0.5)
    assert changes["samples_per_step"] == (2, 4)


def test_schedule_of_a_longer_run_begins_with_its_first_step(train, copied_run):
    train(copied_run, "--resume=last", "--trainer.max_steps=9")
    for step in (6, 7):
        rate = 1e-2 * learning_rate_factor(step, 9, WARMED_UP)
        assert rates(copied_run)[step] == pytest.approx(rate)


def test_provenance_is_recorded_and_other_versions_are_named(
    train, copied_run, capsys, monkeypatch
):
    source = job(copied_run, 1)
    assert source["versions"]["torch"] == metadata.version("torch")  # __version__ may add +cu130
    assert re.match("stu-train .*--checkpoint-every-steps=2", source["command"])
    saved = last_checkpoint(copied_run)["stu"]["provenance"]
    assert saved == {name: source[name] for name in saved}
    versions = {name: f"{version}1" for name, version in provenance._versions().items()}
    monkeypatch.setattr(provenance, "git_commit", lambda _: "f00")
    monkeypatch.setattr(provenance, "_versions", lambda: versions)
    train(copied_run, "--trainer.max_steps=6", "--resume=last")
    changes = r"warning: .*commit .* then, f00 now; .*torch \S+ then, \S+1 now"
    assert re.search(changes, capsys.readouterr().err)


def flip_a_bit(file):
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


@pytest.mark.parametrize(
    "name",
    [
        "training.pt",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("rank-00000.safetensors", "SHA256SUMS")
        ),
    ],
)
def test_auto_goes_back_to_the_checkpoint_before_a_damaged_one(
    train, short_run, copied_run, capsys, name
):
    last = checkpoint(copied_run, 6)
    flip_a_bit(last / name)
    train(copied_run, "--trainer.max_steps=6", f"--resume={last}", code=2)
    assert f"checkpoint {last}: " in capsys.readouterr().err
    output = ["--output", str(copied_run / "model")]
    assert export.main([str(copied_run), *output]) == 2
    assert f"checkpoint {last}: " in capsys.readouterr().err
    train(copied_run, "--trainer.max_steps=6", "--resume=auto")
    assert re.search(r"last.ckpt: .*: goes back to step-00000004.ckpt", capsys.readouterr().err)
    assert_same_state(last_checkpoint(copied_run), last_checkpoint(short_run))
    assert report.read_curves(copied_run)["train/loss"][0] == [1, 2, 3, 4, 5, 6]  # once each
    assert losses(copied_run) == losses(short_run)
    assert export.main([str(copied_run), *output]) == 0


@pytest.mark.parametrize("damage", ["truncate", "garbage", "remove"])
@pytest.mark.parametrize("name", ["training.pt", "rank-00000.safetensors"])
def test_damaged_checkpoint_is_named(copied_run, name, damage):
    file = checkpoint(copied_run, 6) / name
    file.write_bytes(file.read_bytes()[:-100] if damage == "truncate" else os.urandom(1000))
    if damage == "remove":
        file.unlink()
    with pytest.raises(UserError, match=r"6.ckpt: (cut short|rank-00000.\w+ is damaged)"):
        verified_checkpoint(checkpoint(copied_run, 6))


def test_checkpoint_without_a_checksum_of_each_rank_is_not_written(tmp_path):
    """As where a file that another node wrote is not seen yet."""
    for rank in range(2):
        write_rank(tmp_path, rank, [("weight", f"w{rank}", torch.ones(3))], tmp_path)
    (tmp_path / "rank-00001.safetensors.sha256").unlink()
    with pytest.raises(OSError, match=r"could not be written by rank 0 .*rank-00001"):
        write_training(tmp_path, {"stu": {"num_files": 2}}, tmp_path)


def test_checkpoint_of_an_older_version_is_resumed_with_a_message(train, copied_run, capsys):
    """It has no checksums, and fewer settings to compare."""
    folder = copied_run / "checkpoints" / "last.ckpt"
    training = torch.load(folder / "training.pt", weights_only=True)
    record = training["stu"]
    training["stu"] = {
        **{name: record[name] for name in OLD_RECORD},
        "format_version": 2,
        "optimizer": {"learning_rate": record["settings"]["model.optimizer.learning_rate"]},
        "max_steps": 7,
    }
    torch.save(training, folder / "training.pt")
    (folder / "SHA256SUMS").unlink()
    train(copied_run, "--trainer.max_steps=7", "--resume=last")
    printed = capsys.readouterr().err
    assert "an older stu wrote it without checksums" in printed
    assert "another schedule" not in printed
    assert last_checkpoint(copied_run)["global_step"] == 7


def test_ranks_that_resume_from_different_steps_stop(train, copied_run, monkeypatch, capsys):
    """As where one node sees an older state of a shared disk; the other rank is simulated."""

    def other_rank_is_behind(trainer, *values):
        return [max(value, 1 - trainer.global_step) for value in values]

    monkeypatch.setattr(checkpoints, "largest_of_ranks", other_rank_is_behind)
    train(copied_run, "--resume=last", "--trainer.max_steps=9", code=2)
    printed = capsys.readouterr().err
    assert re.search("rank 0 on .* continues from step 6, and others from another", printed)
    assert last_checkpoint(copied_run)["global_step"] == 6


@pytest.mark.slow
def test_two_ranks_equal_one_and_one_rank_continues_their_run(train, settings, long_run, tmp_path):
    """The global batches are the same, so the runs differ only in the order of float32 sums."""
    program, two = Path(sys.executable).with_name("stu-train"), tmp_path / "two"
    ranks = ["--trainer.devices=2", "--data.micro_batch_size=1", f"--run-dir={two}"]
    saves = ["--checkpoint-every-steps=11", "--keep-checkpoints=100"]
    command = [program, *settings, *LONG, *ranks, *saves]
    subprocess.run(command, check=True, timeout=300)
    one = train(tmp_path / "one", *LONG, f"--resume={checkpoint(two, 66)}")
    expected = last_checkpoint(long_run)
    for run in (two, one):
        actual = last_checkpoint(run)
        assert actual["TokenData"] == expected["TokenData"]
        for name, weight in expected["state_dict"].items():
            torch.testing.assert_close(actual["state_dict"][name], weight, rtol=0, atol=1e-4)
    # Means over the whole validation on all ranks, not of one rank's share.
    steps, values = report.read_curves(two)["val/bits_per_byte"]
    expected_steps, expected_values = report.read_curves(long_run)["val/bits_per_byte"]
    assert steps == expected_steps
    assert values == pytest.approx(expected_values, rel=1e-4)


@pytest.fixture
def timer_clock(monkeypatch):
    """A clock that advances at every reading, so that steps take the same time everywhere."""
    readings = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: 0.005 * next(readings))
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", clock)


@pytest.mark.slow
@pytest.mark.usefixtures("timer_clock")
def test_max_time_counts_all_jobs_and_the_schedule_ends_with_it(train, tmp_path, capsys):
    """Otherwise a run that its time limit cuts would stop at its highest rate."""
    more = "--trainer.max_steps=1000000", "--trainer.val_check_interval=1000000"
    run = train(tmp_path / "run", *more, "--trainer.max_time=00:00:00:02")
    first = last_checkpoint(run)["global_step"]
    assert 0 < first < 1_000_000
    assert rates(run)[1] > 0.9 * 1e-2
    assert rates(run)[-1] == pytest.approx(0.1 * 1e-2, rel=1e-2)
    assert rates(run) == sorted(rates(run), reverse=True)
    train(run, *more, "--trainer.max_time=00:00:00:02", "--resume=last")
    assert last_checkpoint(run)["global_step"] == first
    assert "trainer.max_time=00:00:00:02 is used up" in capsys.readouterr().err
    train(run, *more, "--trainer.max_time=00:00:00:04", "--resume=last")
    assert last_checkpoint(run)["global_step"] > first
    half_way = rates(run)[first]  # the saved time counts
    assert half_way == pytest.approx((0.1 + 0.9 * 0.5) * 1e-2, rel=0.2)
    assert rates(run)[-1] == pytest.approx(0.1 * 1e-2, rel=1e-2)


STOPPED_AND_KILLED = """
import os, signal, sys
from train.callbacks import progress as callbacks
from train.checkpoint import callback as checkpoints
from train import cli

def stop(self, trainer, *_):
    if trainer.global_step == 5:
        signal.raise_signal(signal.SIGUSR1)

finish = checkpoints.Checkpoints._finish

def finish_and_die(self, trainer):
    finish(self, trainer)
    if (self._folder / "last.ckpt").exists():
        os.kill(os.getpid(), signal.SIGKILL)

callbacks.StepProgress.on_train_batch_end = stop
checkpoints.Checkpoints._finish = finish_and_die
sys.exit(cli.main(sys.argv[1:]))
"""


def test_logged_series_equals_that_of_an_uninterrupted_run(train, settings, tmp_path, monkeypatch):
    """Killed right after the checkpoint of a logged step, and stopped between two logged steps."""
    more = ["--trainer.max_steps=20", "--trainer.log_every_n_steps=5"]
    more += ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=16"]
    whole, parts = train(tmp_path / "whole", *more), tmp_path / "parts"
    command = [forked.python(), "-c", STOPPED_AND_KILLED, *settings, *more, f"--run-dir={parts}"]
    killed = forked.run(*command)
    assert killed.returncode == -signal.SIGKILL
    with monkeypatch.context() as stopping:
        stopping.setattr(StepProgress, "on_train_batch_end", signal_at(12))
        train(parts, *more, "--resume=last", code=75)
    train(parts, *more, "--resume=last")
    expected, actual = report.read_curves(whole), report.read_curves(parts)
    assert expected["train/loss"][0] == [5, 10, 15, 20]
    for name in ("train/loss", "train/lr", "train/grad_norm", "val/loss", "val/accuracy"):
        assert actual[name] == expected[name], name


def test_signal_ends_a_validation_between_two_batches(train, signalled_validations, tmp_path):
    """Its partial result is not logged as if it were that of the whole split."""
    add, added = ValidationSums.add, []
    signalled_validations.setattr(
        ValidationSums, "add", lambda *arguments: added.append(add(*arguments))
    )
    more = "--trainer.max_steps=9", "--trainer.num_sanity_val_steps=0"
    run = train(tmp_path / "run", *more, code=75)
    assert added == []
    assert last_checkpoint(run)["global_step"] == 6
    assert "val/loss" not in report.read_curves(run)


@pytest.mark.parametrize(
    ("step", "code", "words"), [(2, 75, "stopped at step 2 of 3 for SIGUSR1"), (9, 0, "trained to")]
)
def test_signals_that_are_repeated_while_loggers_end_change_nothing(
    train, tmp_path, monkeypatch, capsys, step, code, words
):
    """In the second case, the first one came after the last step."""
    finalize = TensorBoard.finalize

    def signalled(self, status):
        signal.raise_signal(signal.SIGUSR1)
        finalize(self, status)

    monkeypatch.setattr(StepProgress, "on_train_batch_end", signal_at(step))
    monkeypatch.setattr(StepProgress, "on_train_end", signal_at(3))
    monkeypatch.setattr(TensorBoard, "finalize", signalled)
    train(tmp_path / "run", "--trainer.max_steps=3", code=code)
    assert words in capsys.readouterr().err


def validated_steps(run):
    """Return the steps of validations in the tables of a run."""
    rows = []
    for table in (run / "csv").glob("*/metrics.csv"):
        with table.open() as file:
            rows += csv.DictReader(file)
    return [int(row["step"]) for row in rows if row.get("val/loss")]


@pytest.mark.parametrize(
    "limit",
    [
        "--trainer.max_steps=3",
        pytest.param("--trainer.max_time=00:00:00:01", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("timer_clock")
def test_resume_makes_an_interrupted_last_validation_once(
    train, signalled_validations, tmp_path, limit
):
    """It may be interrupted again, and does not depend on what a logger has written."""
    more = limit, "--trainer.val_check_interval=1000", "--resume=auto", "--logger=[csv]"
    run = tmp_path / "run"
    for _ in range(2):
        train(run, *more, code=75)
    last = last_checkpoint(run)["global_step"]
    assert validated_steps(run) == []
    signalled_validations.undo()
    for _ in range(2):
        train(run, *more)
        assert validated_steps(run) == [last]
    assert last_checkpoint(run)["global_step"] == last


def test_last_validation_is_repeated_with_the_steps_before_it(
    train, copied_run, signalled_validations
):
    more = "--trainer.max_steps=6", "--trainer.val_check_interval=1000", "--logger=[csv]"
    train(copied_run, *more, f"--resume={checkpoint(copied_run, 4)}", code=75)
    signalled_validations.undo()
    train(copied_run, *more, "--resume=last")
    assert validated_steps(copied_run) == [6]
