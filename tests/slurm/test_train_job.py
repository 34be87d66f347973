"""slurm/train.sbatch on two nodes: what interrupts it does not show in what it has learned."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.slurm.conftest import ROOT
from tests.train.saved import load_checkpoint
from train import report
from train.data import TokenData

STEPS, STOP = 200, 60
SECONDS = 240
SETTINGS = {
    "trainer.max_steps": STEPS,
    "trainer.val_check_interval": 50,
    "checkpoint_every_steps": 25,
    "keep_checkpoints": 100,
    "log_samples": True,
    "parallel.kind": "zero",
    "parallel.zero_stage": 3,
}


def arguments(module_settings, run_dir):
    given = {f"--{name}": value for name, value in {**SETTINGS, "run_dir": run_dir}.items()}
    kept = [its for its in module_settings if its.split("=")[0] not in given]
    return [*kept, *(f"{name}={value}" for name, value in given.items())]


@pytest.fixture(scope="session")
def whole(module_settings, tmp_path_factory):
    """A run of as many ranks that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    environment = {name: its for name, its in os.environ.items() if "SLURM" not in name}
    command = [Path(sys.executable).with_name("stu-train"), *arguments(module_settings, folder)]
    subprocess.run(
        [*command, "--trainer.devices=2"],
        check=True,
        timeout=SECONDS,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    return folder


class Job:
    """A submitted run."""

    def __init__(self, cluster, module_settings, folder, nodes=2):
        self.cluster, self.folder, self.run_dir = cluster, folder, folder / "run"
        tasks = 2 // nodes
        head = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", "--cpus-per-task=1"]
        head.append("--gpus-per-node=1")
        self.number = cluster.submit(
            *head,
            "--time=10",
            f"--chdir={folder}",
            ROOT / "slurm" / "train.sbatch",
            *arguments(module_settings, self.run_dir),
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

    def wait_for_step(self, step):
        """Until training has come there."""
        deadline = time.monotonic() + SECONDS
        while not re.search(rf"^step {step}/", self.log, re.MULTILINE):
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def ranks(self):
        """Its processes, on this machine."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if f"--run_dir={self.run_dir}" in command and "python" in command[0]:
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
    job.wait_for_step(STOP)
    cluster.call("scancel", "--signal=USR1", "--batch", job.number)
    job.finish()
    assert cluster.restarts(job.number) == 1
    assert "saved, to be continued" in job.log
    assert_as_if_nothing_had_been(job, whole, data)


def test_goes_on_after_a_rank_is_killed(cluster, job, whole, data):
    job.wait_for_step(STOP)
    job.ranks()[-1].send_signal(signal.SIGKILL)
    job.finish()
    assert cluster.restarts(job.number) == 1
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
    assert STOP - 25 < last["global_step"] < STEPS
    filler.unlink()
    again = Job(cluster, module_settings, tmp_path)
    again.finish()
    assert_as_if_nothing_had_been(again, whole, data)


def test_goes_on_without_a_node_that_is_not_fit(cluster, module_settings, tmp_path):
    """Whose memory is almost all taken; one node is as many as the job needs."""
    scarce = tmp_path / "meminfo"
    lines = Path("/proc/meminfo").read_text().splitlines()
    scarce.write_text(
        "\n".join(re.sub(r"(MemAvailable: +)\d+", r"\g<1>1000", its) for its in lines)
    )
    cluster.kill_node("n1")
    cluster.start_node("n1", f"mount --bind {scarce} /proc/meminfo")
    cluster.wait_for_nodes()
    try:
        job = Job(cluster, module_settings, tmp_path, nodes=1)
        job.finish()
        assert "n1: 0.0 GiB of memory are free, and 4 are needed" in job.log
        (after,) = re.findall(r"goes on as job (\d+), without n1", job.log)
        assert cluster.wait(after, SECONDS) == "COMPLETED"
        assert load_checkpoint(job.run_dir / "checkpoints" / "last.ckpt")["global_step"] == STEPS
    finally:
        cluster.kill_node("n1")
        cluster.start_node("n1")
        cluster.wait_for_nodes()
