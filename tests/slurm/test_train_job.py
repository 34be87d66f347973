"""slurm/train.sbatch on two nodes: what interrupts it does not show in what it has learned."""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests import forked
from tests.slurm.conftest import ROOT
from tests.train.saved import load_checkpoint
from train import report
from train.data.loader import TokenData

STEPS, STOP, SAVED = 120, 30, 15
SECONDS = 240
HEAD = [
    *("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1", "--time=10"),
]
SETTINGS = {
    "trainer.max_steps": STEPS,
    "trainer.val_check_interval": 50,
    "checkpoint-every-steps": SAVED,
    "keep-checkpoints": 100,
    "log-samples": True,
    "parallel.kind": "zero",
    "parallel.zero_stage": 3,
}


def arguments(module_settings, run_dir):
    given = {f"--{name}": value for name, value in {**SETTINGS, "run-dir": run_dir}.items()}
    kept = [its for its in module_settings if its.split("=")[0] not in given]
    return [*kept, *(f"{name}={value}" for name, value in given.items())]


@pytest.fixture(scope="session")
def whole(module_settings, tmp_path_factory):
    """A run of as many ranks that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    environment = {name: its for name, its in os.environ.items() if "SLURM" not in name}
    command = [forked.program("stu-train"), *arguments(module_settings, folder)]
    subprocess.run(
        [*command, "--trainer.devices=2"],
        check=True,
        timeout=SECONDS,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    return folder


class Job:
    """A submitted run."""

    def __init__(self, cluster, module_settings, folder, *options, run_dir=None, more=()):
        self.cluster, self.folder = cluster, folder
        self.run_dir = run_dir or folder / "run"
        self.number = cluster.submit(
            *HEAD,
            f"--chdir={folder}",
            *options,
            ROOT / "slurm" / "train.sbatch",
            *arguments(module_settings, self.run_dir),
            *more,
        )

    @property
    def log(self):
        """What the script said, and the first rank."""
        paths = [self.folder / f"stu-train-{self.number}.log", self.log_folder / "rank-0.log"]
        return "\n".join(path.read_text() for path in paths if path.exists())

    @property
    def log_folder(self):
        """Of the ranks."""
        return self.folder / f"stu-train-{self.number}"

    def wait_for(self, pattern):
        """Until a line of its logs has it."""
        self.until(lambda: re.search(pattern, self.log, re.MULTILINE))

    def until(self, holds):
        deadline = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def wait_for_step(self, step):
        """Until training has come there."""
        self.wait_for(rf"^step {step}/")

    def tell(self, name):
        """The script, by a signal."""
        self.cluster.call("scancel", f"--signal={name}", "--batch", self.number)

    def ranks(self):
        """Its processes, on this machine."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if f"--run-dir={self.run_dir}" in command and "python" in command[0]:
                found.append(process)
        return found

    def finish(self):
        assert self.cluster.wait(self.number, SECONDS) == "COMPLETED", self.log


@pytest.fixture
def job(cluster, module_settings, tmp_path):
    made = Job(cluster, module_settings, tmp_path)
    yield made
    cluster.call("scancel", made.number)


def samples(run_dir):
    """By step, the samples of all ranks; a step that was done again counts as it was at last."""
    steps = {}
    for path in sorted((run_dir / "samples").iterdir()):
        of_rank = {}
        for line in path.read_text().splitlines():
            step, *numbers = map(int, line.split())
            of_rank[step] = numbers
        for step, numbers in of_rank.items():
            steps.setdefault(step, []).extend(numbers)
    return {step: sorted(numbers) for step, numbers in steps.items()}


def assert_as_if_nothing_had_been(job, whole, data):
    actual, expected = (
        load_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (job.run_dir, whole)
    )
    assert actual["global_step"] == STEPS
    assert actual["TokenData"] == expected["TokenData"]
    for name, weight in expected["state_dict"].items():
        assert torch.equal(actual["state_dict"][name], weight), name
    curve, other = (report.read_curves(folder)["train/loss"] for folder in (job.run_dir, whole))
    assert curve == other
    assert curve[0] == list(range(1, STEPS + 1))
    seen = samples(job.run_dir)
    assert seen == samples(whole)
    epoch = TokenData(str(data), seq_len=16, micro_batch_size=2).samples_per_epoch
    in_order = [number for step in sorted(seen) for number in seen[step]]
    first = epoch - epoch % 4  # samples of whole steps
    assert len(set(in_order[:first])) == first


def test_saves_when_its_time_is_up_and_goes_on(cluster, job, whole, data):
    """Whatever it is at: the first signal comes as soon as the script has a line, before there is
    anything to save."""
    job.wait_for("start 1: on ")
    job.tell("USR1")
    job.wait_for("start 2: on ")
    job.until((job.log_folder / "plan.log").exists)
    job.tell("USR1")
    job.wait_for_step(STOP)
    job.tell("USR1")
    job.tell("USR1")  # another one changes nothing
    job.finish()
    assert cluster.restarts(job.number) == 3
    assert re.findall("requeued: (.*)", job.log) == [
        "the time was up during stu-health",
        "the time was up during stu-plan",
        "saved, to be continued",
    ]
    assert_as_if_nothing_had_been(job, whole, data)


def test_goes_on_after_a_rank_is_killed(cluster, job, whole, data):
    job.wait_for_step(STOP)
    job.ranks()[-1].send_signal(signal.SIGKILL)
    job.finish()
    assert cluster.restarts(job.number) == 1
    assert_as_if_nothing_had_been(job, whole, data)


@pytest.mark.slow
def test_saves_and_goes_on_when_it_is_preempted(cluster, job, whole, data):
    """Of which Slurm tells the ranks alone, by SIGTERM, when its grace time begins."""
    job.wait_for_step(STOP)
    urgent = cluster.submit(
        *("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    )
    job.finish()
    assert cluster.state(urgent) == "COMPLETED"
    assert "requeued: preempted while training, with code 143" in job.log
    assert cluster.restarts(job.number) >= 1  # it may begin again before the urgent job does
    stopped = int(re.findall(r"stopped at step (\d+) of", job.log)[0])
    assert (job.run_dir / "checkpoints" / f"step-{stopped:08d}.ckpt").exists()
    assert_as_if_nothing_had_been(job, whole, data)


@pytest.mark.slow
def test_goes_on_after_a_node_is_lost(cluster, job, whole, data):
    job.wait_for_step(STOP)
    cluster.kill_node("n2")
    deadline = time.monotonic() + SECONDS
    while cluster.restarts(job.number) == 0:
        assert time.monotonic() < deadline, job.log
        time.sleep(0.5)
    cluster.start_node("n2")
    job.finish()
    assert_as_if_nothing_had_been(job, whole, data)


def fill(path):
    """Write it until its disk has no room."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(2**12)):
            pass


@pytest.mark.slow
def test_a_full_disk_loses_no_more_than_the_steps_since_the_last_checkpoint(
    cluster, module_settings, tmp_path, whole, data
):
    run_dir, disk = tmp_path / "run", cluster.small_disk
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(disk)
    job = Job(cluster, module_settings, tmp_path)
    job.wait_for_step(STOP)
    filler = disk / "filler"
    fill(filler)
    assert cluster.wait(job.number, SECONDS) == "FAILED", job.log
    logs = "".join(path.read_text() for path in job.log_folder.glob("rank-*.log"))
    assert re.search(r"could not be written by rank \d on n\d \(.*No space left", logs), logs
    assert "could not write" in job.log
    assert cluster.restarts(job.number) == 0
    last = load_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    assert STOP - SAVED <= last["global_step"] < STEPS  # that of STOP may have been under way
    filler.unlink()
    again = Job(cluster, module_settings, tmp_path)
    again.finish()
    assert_as_if_nothing_had_been(again, whole, data)


def test_goes_on_without_a_node_that_is_not_fit(cluster, module_settings, tmp_path):
    """Whose memory is almost all taken. The job keeps its number and all that it was submitted
    with, so that a job that depends on it starts when training is done, and not before."""
    scarce = tmp_path / "meminfo"
    lines = Path("/proc/meminfo").read_text().splitlines()
    scarce.write_text(
        "\n".join(re.sub(r"(MemAvailable: +)\d+", r"\g<1>1000", its) for its in lines)
    )
    cluster.kill_node("n1")
    cluster.start_node("n1", f"mount --bind {scarce} /proc/meminfo")
    cluster.wait_for_nodes()
    try:
        options = "--nodes=1", "--mem=2G", "--job-name=mine", "--output=mine-%j.log", "--nice=7"
        short = "--trainer.max_steps=20", "--parallel.kind=ddp"
        job = Job(cluster, module_settings, tmp_path, *options, more=short)
        log = tmp_path / f"mine-{job.number}.log"
        # As an export would, it needs the last checkpoint.
        found = f"readlink {job.run_dir}/checkpoints/last.ckpt > {tmp_path}/found"
        after = cluster.submit(
            *(f"--dependency=afterok:{job.number}", "--kill-on-invalid-dep=yes", "--mem=1G"),
            *(f"--chdir={tmp_path}", f"--wrap={found}"),
        )
        assert cluster.wait(job.number, SECONDS) == "COMPLETED", log.read_text()
        assert cluster.wait(after, SECONDS) == "COMPLETED"
        assert (tmp_path / "found").read_text() == "step-00000020.ckpt\n"
        assert "n1: 0.0 GiB of memory are free, but 4 are needed" in log.read_text()
        assert "requeued: to continue without n1" in log.read_text()
        shown = cluster.call("scontrol", "show", "job", job.number)
        for kept in ("JobName=mine", "MinMemoryNode=2G", "Nice=7", "ExcNodeList=n1", "Restarts=1"):
            assert kept in shown
        # Without both nodes there would be too few.
        options = "--nodes=1", "--nodelist=n1", "--exclude=n2"
        alone = Job(cluster, module_settings, tmp_path, *options)
        assert cluster.wait(alone.number, SECONDS) == "FAILED", alone.log
        assert "not requeued: without n1,n2 there are 0 nodes, of 1 needed" in alone.log
    finally:
        cluster.kill_node("n1")
        cluster.start_node("n1")
        cluster.wait_for_nodes()


def test_a_folder_belongs_to_one_job(cluster, module_settings, tmp_path):
    """Another one is refused by name, and the same one goes on at once when it is put back."""
    more = "--trainer.max_steps=1000000", "--parallel.kind=ddp", "--log-samples=false"
    job = Job(cluster, module_settings, tmp_path, "--nodes=1", more=more)
    job.wait_for_step(3)
    given = " ".join([*arguments(module_settings, job.run_dir), *more])
    second = cluster.submit(
        *("--ntasks=1", "--mem=1G", f"--chdir={tmp_path}", "--output=second.log"),
        f"--wrap=stu-train {given} --resume=auto",
    )
    assert cluster.wait(second, SECONDS) == "FAILED"
    text = (tmp_path / "second.log").read_text()
    assert "ExitCode=2:0" in cluster.call("scontrol", "show", "job", second), text
    assert f"--run-dir {job.run_dir}" in text
    assert re.search(rf"on n1 \(Slurm job {job.number}\b", text), text
    job.tell("USR1")
    job.wait_for("start 2: on ")
    # Checkpoints alone tell it from the first start: the first rank's log is one for both.
    before = int(re.findall(r"stopped at step (\d+)", job.log)[0])
    job.wait_for_step(before + 1)
    job.tell("TERM")
    assert cluster.wait(job.number, SECONDS) == "FAILED", job.log
    assert "stopped while training, with code 75, as it was told to" in job.log
    shown = cluster.call("scontrol", "show", "job", job.number)
    assert "ExitCode=143:0" in shown
    assert "Restarts=1" in shown
    assert "another job" not in job.log


def test_what_is_refused_is_not_tried_again(cluster, module_settings, tmp_path):
    """By the script or by any rank, with code 2 for all of them, at once; and a job of fewer ranks
    than asked for does not train."""

    def settings(name):
        return " ".join(arguments(module_settings, tmp_path / "runs" / name))

    common = "--cpus-per-task=1", "--mem=1G", "--time=10", f"--chdir={tmp_path}"
    nowhere = Job(cluster, module_settings, tmp_path, run_dir=Path("/proc/nope"))
    # The first rank has all that it needs, and what it says of the other one is the same.
    of_node = f"--data.dir={tmp_path}/$SLURM_NODEID"
    data = next(its for its in module_settings if its.startswith("--data.dir"))
    (tmp_path / "0").symlink_to(data.split("=")[1])
    start = f"stu-train {settings('one-rank')} {of_node} --trainer.num_nodes=2 --trainer.devices=1"
    one_rank = cluster.submit(
        *(*common, "--nodes=2", "--ntasks-per-node=1", "--output=one-rank.log"),
        f"--wrap=srun --wait=60 bash -c '{start}'",
    )
    too_few = cluster.submit(
        *(*common, "--ntasks=1", "--output=too-few.log"),
        f"--wrap=stu-train {settings('too-few')} --trainer.devices=2",
    )
    too_many = cluster.submit(
        *(*common, "--ntasks=2", "--output=too-many.log"),
        f"--wrap=srun stu-train {settings('too-many')}",
    )
    for job, log, message in (
        (nowhere.number, f"stu-train-{nowhere.number}.log", "n1: /proc/nope cannot be written"),
        (one_rank, "one-rank.log", f"rank 1 on n2: .*{tmp_path}/1"),
        (too_few, "too-few.log", "asks for 2 ranks.* 1 task on 1 node.* write srun"),
        (too_many, "too-many.log", r"asks for 1 rank.* srun started 2 tasks.* \(all 2 ranks\)"),
    ):
        assert cluster.wait(job, SECONDS) == "FAILED"
        text = (tmp_path / log).read_text()
        assert re.search(message, text), text
        shown = cluster.call("scontrol", "show", "job", job)
        assert "ExitCode=2:0" in shown, text
        assert "Restarts=0" in shown, text
    assert len(re.findall("rank 1 on n2", (tmp_path / "one-rank.log").read_text())) == 2
    assert not (tmp_path / "runs").exists()
