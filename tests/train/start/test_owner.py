"""One job at a time trains in a run's folder."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from stu.common.errors import UserError
from tests.train.saved import last_checkpoint
from train.callbacks.progress import StepProgress
from train.checkpoint import callback as checkpoints
from train.checkpoint.writer import CheckpointWriter
from train.start import owner, processes
from train.start.owner import RunOwner, owned

FOREVER = 1e6


def record(run_dir, number):
    return json.loads((run_dir / "jobs" / f"{number:05d}.json").read_text())


def claim_elsewhere(run_dir, seconds_ago=0.0, **changes):
    """Let an owner on another machine claim the folder, and return the path of its record."""
    first = RunOwner(run_dir)
    first.claim({})
    first._ended.set()  # ends the heartbeat
    path = run_dir / "jobs" / "00001.json"
    path.write_text(json.dumps({**record(run_dir, 1), "boot": "another", "host": "far", **changes}))
    then = path.stat().st_mtime - seconds_ago
    os.utime(path, (then, then))
    return path


def test_second_run_is_refused_and_the_owner_named(train, tmp_path, capsys):
    first = RunOwner(tmp_path)
    first.claim({"command": "this one"})
    more = "--trainer.max_steps=1", "--resume=auto"
    train(tmp_path, *more, code=2)
    assert f"process {os.getpid()} on " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["00001.json", "jobs"]
    first.end("done")
    train(tmp_path, *more)
    assert record(tmp_path, 1)["ended"]["how"] == record(tmp_path, 2)["ended"]["how"] == "done"


def test_killed_owner_is_succeeded_at_once(tmp_path, capsys):
    code = "import os, sys; from pathlib import Path; from train.start.owner import RunOwner\n"
    code += "RunOwner(Path(sys.argv[1])).claim({}); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    second = RunOwner(tmp_path)
    second.claim({})
    assert second.number == 2
    assert "its process is gone" in capsys.readouterr().err
    second.end("done")


@pytest.mark.parametrize(
    ("seconds_ago", "stale_seconds", "message"),
    [
        (1000, owner.STALE_SECONDS, "no sign of life for 100"),
        (-5, 0.01, "waits up to 0 s for a sign of life"),  # not longer, as it is from the future
    ],
)
def test_owner_elsewhere_without_a_heartbeat_is_succeeded(
    tmp_path, monkeypatch, capsys, seconds_ago, stale_seconds, message
):
    monkeypatch.setattr(owner, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(owner, "STALE_SECONDS", stale_seconds)
    claim_elsewhere(tmp_path, seconds_ago)
    RunOwner(tmp_path).claim({})
    assert message in capsys.readouterr().err


def test_owner_elsewhere_with_a_heartbeat_keeps_the_folder(tmp_path, monkeypatch):
    """Its heartbeat looks old at first."""
    path, ended = claim_elsewhere(tmp_path, seconds_ago=1000), threading.Event()
    monkeypatch.setattr(owner, "WATCH_SECONDS", FOREVER)

    def live():
        while not ended.wait(0.05):
            os.utime(path)

    life = threading.Thread(target=live)
    life.start()
    try:
        with pytest.raises(UserError, match=r"process \d+ on far .* was alive 0 s ago: wait"):
            RunOwner(tmp_path).claim({})
    finally:
        ended.set()
        life.join()


@pytest.mark.parametrize("restart", [1, 2])
def test_restarted_slurm_job_succeeds_itself_at_once(tmp_path, monkeypatch, restart):
    monkeypatch.setattr(owner, "WATCH_SECONDS", FOREVER)
    job = {"cluster": "", "job": "77", "restart": 1}
    claim_elsewhere(tmp_path, slurm=job)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    monkeypatch.delenv("SLURM_CLUSTER_NAME", raising=False)
    mine = {"slurm": {**job, "restart": restart}}
    assert processes.is_same_job_before(record(tmp_path, 1), mine) == (restart == 2)
    if restart == 2:
        RunOwner(tmp_path).claim({})
        assert record(tmp_path, 2)["slurm"] == mine["slurm"]


@pytest.mark.parametrize("has_links", [True, False])
def test_one_of_two_successors_gets_the_folder(tmp_path, monkeypatch, has_links):
    def no_links(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    first, second = RunOwner(tmp_path), RunOwner(tmp_path)
    first.claim({})
    assert not second._create(1)
    assert record(tmp_path, 1)["pid"] == os.getpid()
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["00001.json"]
    first.withdraw()
    assert [*tmp_path.iterdir()] == []


def test_run_that_was_taken_over_writes_no_checkpoint(train, tmp_path, monkeypatch, capsys):
    """It may have been suspended meanwhile."""
    run = tmp_path / "run"

    def take_over(self, trainer, *_):
        if trainer.global_step == 3:
            (run / "jobs" / "00002.json").write_text(json.dumps(record(run, 1)))

    monkeypatch.setattr(StepProgress, "on_train_batch_end", take_over)
    train(run, "--trainer.max_steps=9", "--checkpoint-every-steps=2", code=2)
    error = capsys.readouterr().err
    assert "has taken over" in error
    assert "Traceback" not in error
    assert record(run, 1)["ended"] is None
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names <= {"last.ckpt", "step-00000002.ckpt"}
    if names:
        assert last_checkpoint(run)["global_step"] == 2


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", "a record")


def test_record_that_cannot_be_written_hides_no_error(tmp_path, monkeypatch, capsys):
    """A full disk ends the run, and its own message is the one that counts."""
    ending, not_begun = RunOwner(tmp_path / "a"), RunOwner(tmp_path / "b")
    ending.claim({})
    not_begun.claim({})
    monkeypatch.setattr(RunOwner, "_write", no_space)
    with pytest.raises(KeyError, match="the checkpoint"), owned(ending):
        raise KeyError("the checkpoint")
    assert "00001.json could not be written" in capsys.readouterr().err
    monkeypatch.setattr(type(tmp_path), "unlink", no_space)
    not_begun.withdraw()
    assert "00001.json could not be deleted" in capsys.readouterr().err


def test_hidden_process_of_another_user_is_not_gone(monkeypatch):
    start = processes._start_of(os.getpid())
    assert not processes.is_gone(os.getpid(), start)
    assert processes.is_gone(os.getpid(), "another time")

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(processes, "_contents", lambda path: None)
    monkeypatch.setattr(os, "kill", refuse)
    assert not processes.is_gone(os.getpid(), start)


@pytest.fixture
def exchanged(monkeypatch):
    """What the ranks tell each other, of which there is one."""
    told = []

    def largest(trainer, *values):
        told.append(values)
        return list(map(float, values))

    monkeypatch.setattr(checkpoints, "largest_of_ranks", largest)
    return told


def test_all_ranks_learn_that_the_first_cannot_see_the_owner(tmp_path, monkeypatch, exchanged):
    """If it raised the error alone, the others would wait for it."""
    monkeypatch.setattr(RunOwner, "is_still", no_space)
    writer = CheckpointWriter()
    writer.owner = RunOwner(tmp_path)
    callback = checkpoints.Checkpoints(tmp_path, writer, 1, 1.0, 1)
    with pytest.raises(OSError, match="a record"):
        callback._check_owner(None)
    assert exchanged == [(False,), (True,)]


def test_all_ranks_learn_that_the_first_cannot_link_the_last_checkpoint(
    tmp_path, monkeypatch, exchanged
):
    monkeypatch.setattr(checkpoints.Checkpoints, "_point_at", no_space)
    callback = checkpoints.Checkpoints(tmp_path, CheckpointWriter(), 1, 1.0, 1)
    path = tmp_path / "step-00000001.ckpt"
    trainer = SimpleNamespace(global_step=1, global_rank=0, is_global_zero=True, ckpt_path=path)
    with pytest.raises(OSError, match="a record"):
        callback.on_train_start(trainer, None)
    assert exchanged[-1] == (True,)
