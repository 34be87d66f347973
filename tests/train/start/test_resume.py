"""A run that stops and continues equals one that never stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Timer

from tests import forked
from tests.train.saved import load_checkpoint
from train import cli, report
from train.callbacks.progress import StepProgress
from train.checkpoint import export
from train.checkpoint import writer as checkpoint_writer
from train.data.loader import TokenData
from train.evaluation import ValidationSums
from train.optimizer import OptimizerConfig, learning_rate_factor
from train.start import provenance

STEPS = 100
"""At 2 samples a step, past the end of the first epoch."""
OLD_RECORD = ("model_config", "tokenizer", "num_files", "guard")
"""Parts of a checkpoint that it had before it had checksums."""
WARMED_UP = OptimizerConfig(warmup_steps=1)
VALIDATED = "--trainer.val_check_interval=25"


@pytest.fixture
def train(settings, tmp_path):
    """Run `stu-train`; stopping early keeps the schedule, as a time limit would."""

    def run(folder, *arguments):
        if (tmp_path / folder).exists():
            time.sleep(1.1)  # TensorBoard tells a run's files apart by the second
        common = [*settings, f"--run-dir={tmp_path / folder}", f"--trainer.max_steps={STEPS}"]
        assert cli.main([*common, VALIDATED, *map(str, arguments)]) == 0
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


@pytest.mark.parametrize("stop", [3, 25, 90])
def test_losses_and_weights_are_bit_equal(train, data, stop):
    """Stopped between validations, right at one, and in the second epoch."""
    whole = train("whole", f"--checkpoint-every-steps={stop}")
    checkpoint = whole / "checkpoints" / f"step-{stop:08d}.ckpt"
    if not checkpoint.exists():  # only the newest are kept
        train("early", f"--checkpoint-every-steps={stop}", "--keep-checkpoints=100")
        checkpoint = whole.parent / "early" / "checkpoints" / f"step-{stop:08d}.ckpt"
    assert state(whole)["TokenData"]["position"] == 2 * STEPS
    assert 2 * 5 < TokenData(str(data), 16, 2).samples_per_epoch < 2 * 90
    resumed = train("resumed", f"--resume={checkpoint}")
    expected = {step: loss for step, loss in losses(whole).items() if step > stop}
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


def test_a_time_limit_waits_for_the_end_of_an_optimizer_step(train, monkeypatch):
    """A checkpoint between two micro-batches would lose the gradients of the first."""
    accumulate = "--trainer.accumulate_grad_batches=3"
    whole = train("whole", accumulate)

    def on_train_batch_end(timer, trainer, *_):
        timer.batches = getattr(timer, "batches", 0) + 1
        trainer.should_stop = timer.batches >= 5  # in the middle of the second step

    with monkeypatch.context() as stopping:
        stopping.setattr(Timer, "on_train_batch_end", on_train_batch_end)
        parts = train("parts", accumulate, "--trainer.max_time=01:00:00:00")
    stopped = state(parts)
    assert (stopped["global_step"], stopped["TokenData"]["position"]) == (2, 12)
    assert report.read_curves(parts)["val/loss"][0][-1] == 2  # validated before it stopped
    train("parts", accumulate, "--resume=last")
    assert losses(parts) == losses(whole)
    assert_same_state(state(parts), state(whole))


def test_a_signal_saves_without_another_validation(train, settings, monkeypatch, tmp_path):
    """For which there may be no time."""

    def signal_at_seven(self, trainer, *_):
        if trainer.global_step == 7:
            signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(StepProgress, "on_train_batch_end", signal_at_seven)
    with pytest.raises(SystemExit) as ended:
        train("run", "--trainer.val_check_interval=5")
    assert ended.value.code == 75
    run = tmp_path / "run"
    assert state(run)["global_step"] == 7
    assert report.read_curves(run)["val/loss"][0] == [5]


def test_a_validation_before_the_first_step(train):
    more = "--trainer.accumulate_grad_batches=4", "--trainer.val_check_interval=2"
    run = train("run", *more, "--trainer.max_steps=2")
    assert state(run)["global_step"] == 2


def test_auto_begins_goes_on_and_finds_a_checkpoint_not_yet_called_last(train):
    whole = train("whole", "--trainer.max_steps=6")
    run = train("run", "--resume=auto", "--trainer.max_steps=6", "--checkpoint-every-steps=3")
    folder = run / "checkpoints"
    shutil.rmtree(folder / "step-00000006.ckpt")
    (folder / "last.ckpt").unlink()
    train("run", "--resume=auto", "--trainer.max_steps=6")
    assert_same_state(state(run), state(whole))


def test_a_run_is_not_mixed_with_another(train, settings, capsys):
    one, two = train("one", "--trainer.max_steps=2"), train("two", "--trainer.max_steps=2")
    last = one / "checkpoints" / "last.ckpt"
    arguments = [*settings, f"--run-dir={two}", f"--resume={last}", "--trainer.max_steps=3"]
    assert cli.main(arguments) == 2
    assert "holds another run" in capsys.readouterr().err
    (two / "checkpoints" / "last.ckpt").unlink()
    (two / "checkpoints" / "last.ckpt").symlink_to("gone.ckpt")
    shutil.rmtree(two / "checkpoints" / "step-00000002.ckpt")
    arguments = [*settings, f"--run-dir={two}", "--resume=auto", "--trainer.max_steps=3"]
    assert cli.main(arguments) == 2  # and nothing is overwritten
    assert "no checkpoints/last.ckpt" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_deleted_ends_no_run(train, monkeypatch):
    delete = shutil.rmtree

    def refuses(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError("Directory not empty")
        if ".tmp" in str(path):
            delete(path, ignore_errors=True)

    monkeypatch.setattr(shutil, "rmtree", refuses)
    more = "--trainer.max_steps=5", "--checkpoint-every-steps=1", "--keep-checkpoints=2"
    assert state(train("run", *more))["global_step"] == 5


def test_steps_that_are_done_again_are_logged_once(train):
    run = train("run", "--checkpoint-every-steps=10", "--keep-checkpoints=9")
    before = losses(run)
    train("run", f"--resume={run / 'checkpoints' / 'step-00000020.ckpt'}")
    assert report.read_curves(run)["train/loss"][0] == list(range(1, STEPS + 1))
    assert losses(run) == before


def test_the_saved_settings_resume_a_run(train, capsys):
    run = train("run", "--trainer.max_steps=2")
    arguments = [f"--config={run / 'config.yaml'}", "--trainer.max_steps=4", "--resume=last"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().err
    assert (
        "\nwarning: trainer.max_steps=4, but the checkpoint was trained with 2: " in f"\n{printed}"
    )
    assert state(run)["global_step"] == 4


def test_a_failed_save_leaves_the_last_checkpoint(train, settings, capsys, monkeypatch):
    run = train("run", "--trainer.max_steps=3")
    save = torch.save

    def disk_full(contents, path):
        save({"a": torch.zeros(9)}, path)
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(torch, "save", disk_full)
    arguments = [*settings, f"--run-dir={run}", "--resume=last", "--trainer.max_steps=6"]
    assert cli.main([*arguments, "--checkpoint-every-steps=1"]) == 2
    error = capsys.readouterr().err
    assert "step-00000004.ckpt: could not be written" in error
    assert "Traceback" not in error
    names = sorted(file.name for file in (run / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step-00000003.ckpt"]
    assert state(run)["global_step"] == 3


def test_training_goes_on_while_a_checkpoint_is_written(train, monkeypatch):
    """Which is the last one no sooner than it is whole; the next one waits for it."""
    write, is_wanted, seen = checkpoint_writer.write_rank, threading.Event(), {}

    def write_slowly(*arguments):
        assert is_wanted.wait(60)
        write(*arguments)

    def look(self, trainer, *_):
        folder = Path(trainer.default_root_dir) / "checkpoints"
        seen[trainer.global_step] = sorted(path.name for path in folder.glob("[!.]*"))
        if trainer.global_step == 5:
            is_wanted.set()

    whole = train("whole", "--trainer.max_steps=8")
    with monkeypatch.context() as slow:
        slow.setattr(checkpoint_writer, "write_rank", write_slowly)
        slow.setattr(StepProgress, "on_train_batch_end", look)
        run = train("run", "--checkpoint-every-steps=3", "--trainer.max_steps=8")
    assert seen[4] == seen[5] == []
    assert seen[7] == ["last.ckpt", "step-00000003.ckpt"]
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"last.ckpt", *(f"step-0000000{step}.ckpt" for step in (3, 6, 8))}
    assert_same_state(state(run), state(whole))
    early = load_checkpoint(run / "checkpoints" / "step-00000003.ckpt")
    assert early["global_step"] == early["optimizer_step"] == 3
    again = train(
        "again", f"--resume={run / 'checkpoints' / 'step-00000003.ckpt'}", "--trainer.max_steps=8"
    )
    assert_same_state(state(again), state(whole))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.optimizer.learning_rate=0.5", "learning_rate=0.5, .* trained with 0.01: "),
        ("--model.config.num_heads=4", "num_heads=4, .* trained with 2: "),
    ],
)
def test_other_settings_are_refused(train, settings, capsys, argument, message):
    """An optimizer's state carries its own learning rate, so the new one would be ignored."""
    run = train("run", "--trainer.max_steps=1")
    arguments = [*settings, f"--run-dir={run}", "--resume=last", "--trainer.max_steps=1", argument]
    assert cli.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_all_that_changes_the_result_is_refused_by_name(train, settings, data, tmp_path, capsys):
    run = train("run", "--trainer.max_steps=1")
    before = (run / "checkpoints" / "last.ckpt" / "training.pt").read_bytes()
    other = tmp_path / "other"
    shutil.copytree(data, other)
    tokens = bytearray((other / "train-00000.bin").read_bytes())
    tokens[2000] ^= 1
    (other / "train-00000.bin").write_bytes(tokens)
    for argument, message in [
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
    ]:
        more = [f"--run-dir={run}", "--resume=last", "--trainer.max_steps=2", *argument.split()]
        assert cli.main([*settings, *more]) == 2
        assert re.search(message, capsys.readouterr().err), argument
    assert (run / "checkpoints" / "last.ckpt" / "training.pt").read_bytes() == before
    assert [path.name for path in (run / "jobs").iterdir()] == ["00001.json"]


def test_a_change_that_is_allowed_by_name_is_made_and_recorded(train, settings, capsys):
    run = train("run", "--trainer.max_steps=4")
    allowed = "--allow-change=model.optimizer.learning_rate,model.optimizer.weight_decay"
    more = [allowed, "--allow-change", "data.seed,samples_per_step", "--resume=last"]
    more += ["--model.optimizer.learning_rate=0.5", "--model.optimizer.weight_decay=0.25"]
    more += ["--data.seed=7", "--data.micro_batch_size=4", "--trainer.max_steps=4"]
    assert rates(run)[-1] == pytest.approx(0.1 * 1e-2)
    train("run", *more, "--trainer.max_steps=7")
    assert "the checkpoint was trained with 4" in capsys.readouterr().err
    assert rates(run)[4] == pytest.approx(0.5 * learning_rate_factor(4, 7, WARMED_UP))
    assert rates(run)[-1] == pytest.approx(0.1 * 0.5)
    saved = load_checkpoint(run / "checkpoints" / "last.ckpt")
    groups = saved["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0]
    assert saved["TokenData"]["position"] == 2 * 4 + 4 * 3
    changes = {
        change["name"]: (change["before"], change["now"]) for change in job(run, 2)["changes"]
    }
    assert changes["model.optimizer.learning_rate"] == (0.01, 0.5)
    assert changes["samples_per_step"] == (2, 4)
    assert saved["stu"]["changes"] == job(run, 2)["changes"]
    assert {change["step"] for change in saved["stu"]["changes"]} == {4}
    assert (
        cli.main(
            [
                *settings,
                f"--run-dir={run}",
                *more[:3],
                "--model.config.width=32",
                "--resume=last",
                "--allow-change=model.config.width",
                *more[4:],
            ]
        )
        == 2
    )
    assert "make another model" in capsys.readouterr().err


def job(run, number):
    return json.loads((run / "jobs" / f"{number:05d}.json").read_text())


def test_where_results_come_from_is_recorded_and_another_version_told(train, capsys, monkeypatch):
    run = train("run", "--trainer.max_steps=2", "--model.z_loss=0")
    source = job(run, 1)
    assert source["versions"]["torch"] == torch.__version__
    assert re.match("stu-train .*--model.z_loss=0", source["command"])
    saved = load_checkpoint(run / "checkpoints" / "last.ckpt")["stu"]["provenance"]
    assert saved == {name: source[name] for name in saved}
    versions = {name: f"{version}1" for name, version in provenance._versions().items()}
    monkeypatch.setattr(provenance, "git_commit", lambda _: "f00")
    monkeypatch.setattr(provenance, "_versions", lambda: versions)
    train("run", "--trainer.max_steps=2", "--resume=last")
    changes = r"warning: .*commit .* then, f00 now; .*torch \S+ then, \S+1 now"
    assert re.search(changes, capsys.readouterr().err)


def flip_a_bit(file):
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "training.pt", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_found_and_the_one_before_it_taken(train, settings, capsys, name):
    whole = train("whole", "--trainer.max_steps=6")
    run = train("run", "--trainer.max_steps=6", "--checkpoint-every-steps=2")
    last = run / "checkpoints" / "step-00000006.ckpt"
    flip_a_bit(last / name)
    again = [*settings, f"--run-dir={run}", "--trainer.max_steps=6"]
    assert cli.main([*again, f"--resume={last}"]) == 2
    assert f"checkpoint {last}: " in capsys.readouterr().err
    assert export.main([str(run), "--output", str(run / "model")]) == 2
    assert f"checkpoint {last}: " in capsys.readouterr().err
    train("run", "--trainer.max_steps=6", "--resume=auto")
    assert re.search(r"last.ckpt: .*: goes back to step-00000004.ckpt", capsys.readouterr().err)
    assert_same_state(state(run), state(whole))
    assert export.main([str(run), "--output", str(run / "model")]) == 0


def test_a_checkpoint_of_an_older_stu_is_taken_with_a_word(train, capsys):
    """Without checksums, and with fewer settings to compare."""
    run = train("run", "--trainer.max_steps=1")
    folder = run / "checkpoints" / "last.ckpt"
    training = torch.load(folder / "training.pt", weights_only=True)
    record = training["stu"]
    training["stu"] = {
        **{name: record[name] for name in OLD_RECORD},
        "format_version": 2,
        "optimizer": {"learning_rate": record["settings"]["model.optimizer.learning_rate"]},
        "max_steps": 2,
    }
    torch.save(training, folder / "training.pt")
    (folder / "SHA256SUMS").unlink()
    train("run", "--trainer.max_steps=2", "--resume=last")
    printed = capsys.readouterr().err
    assert "an older stu wrote it without checksums" in printed
    assert "another schedule" not in printed
    assert state(run)["global_step"] == 2


@pytest.mark.parametrize("name", ["seed=5", "seq_len=8"])
def test_another_order_of_samples_is_refused(train, settings, tmp_path, capsys, name):
    run = train("run", "--trainer.max_steps=2")
    file = run / "checkpoints" / "last.ckpt" / "training.pt"
    before = file.read_bytes()
    arguments = [*settings, f"--run-dir={run}", "--resume=last", f"--data.{name}"]
    assert cli.main([*arguments, "--trainer.max_steps=4"]) == 2
    assert f"data.{name.split('=')[0]} is" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_ranks_that_go_on_from_different_steps_stop(train, settings, monkeypatch, capsys):
    """As where a node's view of a shared disk is old; here the other rank is made up."""
    from train.checkpoint import callback as checkpoints

    def other_rank_is_behind(trainer, *values):
        return [max(value, 1 - trainer.global_step) for value in values]

    run = train("run", "--trainer.max_steps=3")
    monkeypatch.setattr(checkpoints, "largest_of_ranks", other_rank_is_behind)
    again = [*settings, f"--run-dir={run}", "--resume=last", "--trainer.max_steps=6"]
    assert cli.main(again) == 2
    printed = capsys.readouterr().err
    assert re.search("rank 0 on .* continues from step 3, and others from another", printed)
    assert state(run)["global_step"] == 3


@pytest.mark.parametrize("damage", ["truncate", "garbage", "remove"])
@pytest.mark.parametrize("name", ["training.pt", "rank-00000.safetensors"])
def test_a_damaged_checkpoint_is_named(train, settings, capsys, name, damage):
    run = train("run", "--trainer.max_steps=1")
    file = run / "checkpoints" / "last.ckpt" / name
    file.write_bytes(file.read_bytes()[:-100] if damage == "truncate" else os.urandom(1000))
    if damage == "remove":
        file.unlink()
    arguments = [*settings, f"--run-dir={run}", "--resume=last", "--trainer.max_steps=2"]
    assert cli.main(arguments) == 2
    assert re.search(r"last.ckpt: (cut short|rank-00000.\w+ is damaged)", capsys.readouterr().err)


def test_two_ranks_equal_one_and_either_goes_on_as_the_other(train, settings, tmp_path):
    """The same global batch on other ranks: equal but for the order of float32 sums."""
    whole = train("whole")
    program = Path(sys.executable).with_name("stu-train")
    ranks = ["--trainer.devices=2", "--data.micro_batch_size=1"]
    common = [program, *settings, *ranks, f"--run-dir={tmp_path / 'two'}"]
    command = [*common, VALIDATED, f"--trainer.max_steps={STEPS}"]
    command += ["--checkpoint-every-steps=11", "--keep-checkpoints=100"]
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


def rates(run):
    return report.read_curves(run)["train/lr"][1]


class Clock:
    """A clock that advances whenever it is read, so that steps take the same time everywhere."""

    now = 0.0

    def monotonic(self):
        self.now += 0.005
        return self.now


def test_max_time_is_that_of_all_jobs_and_the_schedule_ends_with_it(train, capsys, monkeypatch):
    """Cut by its time, a run would otherwise stop at its highest rate."""
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", Clock())
    more = ["--trainer.max_steps=1000000", "--trainer.val_check_interval=1000000"]
    run = train("run", *more, "--trainer.max_time=00:00:00:02", "--trainer.log_every_n_steps=1")
    first = state(run)["global_step"]
    assert 0 < first < 1_000_000
    assert rates(run)[1] > 0.9 * 1e-2
    assert rates(run)[-1] == pytest.approx(0.1 * 1e-2, rel=1e-2)
    assert rates(run) == sorted(rates(run), reverse=True)
    train("run", *more, "--trainer.max_time=00:00:00:02", "--resume=last")
    assert state(run)["global_step"] == first
    assert "trainer.max_time=00:00:00:02 is used up" in capsys.readouterr().err
    train("run", *more, "--trainer.max_time=00:00:00:04", "--resume=last")
    assert state(run)["global_step"] > first
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


def test_the_logged_series_is_that_of_a_run_that_never_stopped(
    train, settings, tmp_path, monkeypatch
):
    """Killed right after the checkpoint of a logged step, and stopped between two logged steps."""
    more = ["--trainer.max_steps=20", "--trainer.log_every_n_steps=5"]
    more += ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=16"]
    whole = train("whole", *more)

    command = [forked.python(), "-c", STOPPED_AND_KILLED, *settings, *more]
    command.append(f"--run-dir={tmp_path / 'parts'}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, timeout=300, env=environment)
    assert killed.returncode == -signal.SIGKILL

    def stop(self, trainer, *_):
        if trainer.global_step == 12:
            signal.raise_signal(signal.SIGUSR1)

    with monkeypatch.context() as stopping:
        stopping.setattr(StepProgress, "on_train_batch_end", stop)
        with pytest.raises(SystemExit):
            train("parts", *more, "--resume=last")
    parts = train("parts", *more, "--resume=last")
    expected, actual = report.read_curves(whole), report.read_curves(parts)
    assert expected["train/loss"][0] == [5, 10, 15, 20]
    for name in ("train/loss", "train/lr", "train/grad_norm", "val/loss", "val/accuracy"):
        assert actual[name] == expected[name], name


def test_a_signal_ends_a_validation_between_two_batches(train, monkeypatch, tmp_path):
    """What it has by then is not logged as if it were all of the split."""
    seen = []

    def signal_at_once(self, trainer, *_):
        if not trainer.sanity_checking:
            signal.raise_signal(signal.SIGUSR1)

    add = ValidationSums.add
    monkeypatch.setattr(StepProgress, "on_validation_start", signal_at_once)
    monkeypatch.setattr(StepProgress, "on_validation_batch_end", lambda *_: None)
    monkeypatch.setattr(StepProgress, "on_validation_end", lambda *_: None)
    monkeypatch.setattr(ValidationSums, "add", lambda *given: seen.append(add(*given)))
    with pytest.raises(SystemExit) as ended:
        train("run", "--trainer.val_check_interval=5", "--trainer.num_sanity_val_steps=0")
    assert ended.value.code == 75
    assert seen == []
    run = tmp_path / "run"
    assert state(run)["global_step"] == 6
    assert "val/loss" not in report.read_curves(run)


@pytest.mark.parametrize("is_timed", [False, True])
def test_a_last_validation_that_was_left_is_made_after_a_resume(
    train, monkeypatch, tmp_path, is_timed
):
    """Also if it is left again; once it is logged, no more."""
    if is_timed:
        monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", Clock())
    limit = "--trainer.max_time=00:00:00:01" if is_timed else "--trainer.max_steps=3"
    more = limit, "--trainer.val_check_interval=1000", "--resume=auto"

    def signal_at_once(self, trainer, *_):
        if not trainer.sanity_checking:
            signal.raise_signal(signal.SIGUSR1)

    with monkeypatch.context() as stopping:
        stopping.setattr(StepProgress, "on_validation_start", signal_at_once)
        for hook in ("on_validation_batch_end", "on_validation_end"):
            stopping.setattr(StepProgress, hook, lambda *_: None)
        for _ in range(2):
            with pytest.raises(SystemExit) as ended:
                train("run", *more)
            assert ended.value.code == 75
    run = tmp_path / "run"
    last = state(run)["global_step"]
    assert "val/loss" not in report.read_curves(run)
    for _ in range(2):
        train("run", *more)
        assert report.read_curves(run)["val/loss"][0] == [last]
    assert state(run)["global_step"] == last
