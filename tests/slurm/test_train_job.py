"""slurm/train.sbatch on two nodes: interruptions do not change what is trained.

Jobs mostly wait, so all scenarios run at the same time, each in a thread, and each test waits for
one of them. Tests that preempt jobs or lose a node run alone.
"""

import contextlib
import os
import re
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.slurm.cluster import SECONDS, SlurmCluster, until
from tests.slurm.conftest import ROOT, find_clients
from tests.train.saved import load_checkpoint
from train import report
from train.data.loader import TokenData
from train.health.cli import TIMEOUT_SECONDS

STEPS, STOP, SAVED = 70, 30, 15
RANK = ["--cpus-per-task=1", "--mem=1G", "--time=10"]
HEAD = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", *RANK]
SETTINGS = {
    "trainer.max_steps": STEPS,
    "trainer.val_check_interval": 50,
    "checkpoint-every-steps": SAVED,
    "keep-checkpoints": 100,
    "log-samples": True,
    "parallel.kind": "zero",
    "parallel.zero_stage": 3,
}


def arguments(settings, run_dir):
    changes = {f"--{name}": value for name, value in {**SETTINGS, "run-dir": run_dir}.items()}
    kept = [setting for setting in settings if setting.split("=")[0] not in changes]
    return [*kept, *(f"{name}={value}" for name, value in changes.items())]


def train_without_slurm(settings, run_dir):
    environment = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    command = [forked.program("stu-train"), *arguments(settings, run_dir)]
    environment["OMP_NUM_THREADS"] = "1"
    subprocess.run([*command, "--trainer.devices=2"], check=True, timeout=SECONDS, env=environment)
    return run_dir


class Job:
    """A submitted run."""

    def __init__(self, cluster, folder, run_dir, *arguments):
        self.cluster, self.run_dir = cluster, run_dir
        self.number = cluster.submit(*HEAD, f"--chdir={folder}", *arguments)
        self.log_folder = folder / f"stu-train-{self.number}"
        """Logs of the ranks."""

    @property
    def log(self):
        """The logs of the script and the first rank."""
        paths = [self.log_folder.with_suffix(".log"), self.log_folder / "rank-0.log"]
        return "\n".join(path.read_text() for path in paths if path.exists())

    def wait_for(self, pattern):
        """Wait for a line in the logs."""
        until(lambda: re.search(pattern, self.log, re.MULTILINE), lambda: self.log)

    def wait_for_step(self, step):
        self.wait_for(rf"^step {step}/")

    def signal(self, name):
        """Send a signal to the script."""
        self.cluster.call("scancel", f"--signal={name}", "--batch", self.number)

    def finish(self, state="COMPLETED"):
        assert self.cluster.wait(self.number) == state, self.log


@dataclass
class Scene:
    """A cluster and a folder for a scenario."""

    cluster: SlurmCluster
    settings: list[str]
    folder: Path
    uninterrupted: "Future[Path]"
    """Folder of a run of as many ranks that was not interrupted."""

    @property
    def data_dir(self):
        (setting,) = (name for name in self.settings if name.startswith("--data.dir="))
        return setting.split("=")[1]

    def submit(self, *options, run_dir=None, more=()):
        run_dir = run_dir or self.folder / "run"
        script = ROOT / "slurm" / "train.sbatch"
        settings = arguments(self.settings, run_dir)
        return Job(self.cluster, self.folder, run_dir, *options, script, *settings, *more)

    def assert_same_result(self, job):
        """Compare the weights, losses and samples of a job with the uninterrupted run's."""
        folders = job.run_dir, self.uninterrupted.result()
        actual, expected = (load_checkpoint(run / "checkpoints" / "last.ckpt") for run in folders)
        assert actual["global_step"] == STEPS
        assert actual["TokenData"] == expected["TokenData"]
        for name, weight in expected["state_dict"].items():
            assert torch.equal(actual["state_dict"][name], weight), name
        curve, other = (report.read_curves(folder)["train/loss"] for folder in folders)
        assert curve == other
        assert curve[0] == list(range(1, STEPS + 1))
        seen, expected = map(samples, folders)
        assert seen == expected
        loader = TokenData(self.data_dir, seq_len=16, micro_batch_size=2)
        in_order = [number for step in sorted(seen) for number in seen[step]]
        first = loader.samples_per_epoch // 4 * 4  # samples of whole steps
        assert len(set(in_order[:first])) == first


def samples(run_dir):
    """Return the samples of all ranks by step. For a repeated step the last time counts."""
    steps = {}
    for path in sorted((run_dir / "samples").iterdir()):
        of_rank = {}
        for line in path.read_text().splitlines():
            step, *numbers = map(int, line.split())
            of_rank[step] = numbers
        for step, numbers in of_rank.items():
            steps.setdefault(step, []).extend(numbers)
    return {step: sorted(numbers) for step, numbers in steps.items()}


def saves_and_continues_when_its_time_is_up(scene):
    job = scene.submit()
    job.wait_for_step(STOP)
    job.signal("USR1")
    job.signal("USR1")  # another one changes nothing
    job.finish()
    assert re.findall("requeued: (.*)", job.log) == ["saved, to be continued"]
    assert scene.cluster.restarts(job.number) == 1
    scene.assert_same_result(job)


def is_requeued_when_its_time_is_up_before_training(scene):
    """The first signal arrives as soon as the script has written a line."""
    job = scene.submit()
    job.wait_for("start 1: on ")
    job.signal("USR1")
    job.wait_for("start 2: on ")
    until((job.log_folder / "plan.log").exists, lambda: job.log)
    job.signal("USR1")
    job.wait_for("start 3: on ")
    job.signal("TERM")
    job.finish("FAILED")
    assert re.findall("requeued: (.*)", job.log) == [
        "the time was up during stu-health",
        "the time was up during stu-plan",
    ]


def continues_after_a_rank_is_killed(scene):
    job = scene.submit()
    job.wait_for_step(STOP)
    find_clients(f"--run-dir={job.run_dir}")[-1].kill()
    job.finish()
    assert scene.cluster.restarts(job.number) == 1
    scene.assert_same_result(job)


def continues_without_an_unfit_node(scene):
    """The job keeps its number and its options, so a job that depends on it starts when training
    is done, and not before."""
    cluster, folder = scene.cluster, scene.folder
    options = "--partition=scarce", "--nodes=1"
    # Without both nodes there would be too few.
    alone = scene.submit(*options, "--nodelist=n3", "--exclude=n1")
    options += "--mem=2G", "--job-name=mine", "--output=mine-%j.log", "--nice=7"
    job = scene.submit(
        *options, more=("--trainer.max_steps=20", "--parallel.kind=ddp", "--parallel.zero_stage=1")
    )
    log = folder / f"mine-{job.number}.log"
    # As an export would, it needs the last checkpoint.
    found = f"readlink {job.run_dir}/checkpoints/last.ckpt > {folder}/found"
    after = cluster.submit(
        *(f"--dependency=afterok:{job.number}", "--kill-on-invalid-dep=yes", "--mem=1G"),
        *(f"--chdir={folder}", f"--wrap={found}"),
    )
    assert cluster.wait(job.number) == "COMPLETED", log.read_text()
    assert cluster.wait(after) == "COMPLETED"
    assert (folder / "found").read_text() == "step-00000020.ckpt\n"
    assert "n3: 0.0 GiB of memory are free, but 4 are needed" in log.read_text()
    assert "requeued: to continue without n3" in log.read_text()
    shown = cluster.call("scontrol", "show", "job", job.number)
    for kept in ("JobName=mine", "MinMemoryNode=2G", "Nice=7", "ExcNodeList=n3", "Restarts=1"):
        assert kept in shown
    alone.finish("FAILED")
    assert "not requeued: without n3,n1 there are 0 nodes, of 1 needed" in alone.log


def owns_its_folder(scene):
    """Another job is refused by name, and the same one continues at once when it is requeued."""
    more = (
        "--trainer.max_steps=1000000",
        "--parallel.kind=ddp",
        "--parallel.zero_stage=1",
        "--log-samples=false",
    )
    job = scene.submit("--nodes=1", more=more)
    job.wait_for_step(3)
    settings = " ".join([*arguments(scene.settings, job.run_dir), *more])
    second = scene.cluster.submit(
        *("--ntasks=1", *RANK, f"--chdir={scene.folder}", "--output=second.log"),
        f"--wrap=stu-train {settings} --resume=auto",
    )
    assert scene.cluster.wait(second) == "FAILED"
    text = (scene.folder / "second.log").read_text()
    assert "ExitCode=2:0" in scene.cluster.call("scontrol", "show", "job", second), text
    assert f"--run-dir {job.run_dir}" in text
    assert re.search(rf"on n\d \(Slurm job {job.number}\b", text), text
    job.signal("USR1")
    job.wait_for("start 2: on ")
    # The first rank's log is the same file for both starts.
    before = int(re.findall(r"stopped at step (\d+)", job.log)[0])
    job.wait_for_step(before + 1)
    job.signal("TERM")
    job.finish("FAILED")
    assert "stopped by SIGTERM while training, with code 75" in job.log
    shown = scene.cluster.call("scontrol", "show", "job", job.number)
    assert "ExitCode=143:0" in shown
    assert "Restarts=1" in shown
    assert "another job" not in job.log


def is_not_repeated_after_a_refusal(scene):
    """All ranks end with code 2 if the script or any rank refuses; and a job of fewer ranks than
    asked for does not train."""
    cluster, folder = scene.cluster, scene.folder

    def settings(name):
        return " ".join(arguments(scene.settings, folder / f"run-{name}"))

    common = *RANK, f"--chdir={folder}"
    nowhere = scene.submit(run_dir=Path("/proc/nope"))
    # The first rank has all that it needs, and reports the other one's problem.
    of_node = f"--data.dir={folder}/$SLURM_NODEID"
    (folder / "0").symlink_to(scene.data_dir)
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
        (one_rank, "one-rank.log", f"rank 1 on n2: .*{folder}/1"),
        (too_few, "too-few.log", "asks for 2 ranks.* 1 task on 1 node.* write srun"),
        (too_many, "too-many.log", r"asks for 1 rank.* srun started 2 tasks.* \(all 2 ranks\)"),
    ):
        assert cluster.wait(job) == "FAILED"
        text = (folder / log).read_text()
        assert re.search(message, text), text
        shown = cluster.call("scontrol", "show", "job", job)
        assert "ExitCode=2:0" in shown, text
        assert "Restarts=0" in shown, text
    assert len(re.findall("rank 1 on n2", (folder / "one-rank.log").read_text())) == 2
    assert not list(folder.glob("run-*"))


def loses_little_when_the_disk_is_full(scene):
    """Only the steps since the last checkpoint are lost."""
    disk = scene.cluster.small_disk
    (scene.folder / "run").mkdir()
    (scene.folder / "run" / "checkpoints").symlink_to(disk)
    job = scene.submit()
    job.wait_for_step(STOP)
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(2**12)):
            pass
    job.finish("FAILED")
    logs = "".join(path.read_text() for path in job.log_folder.glob("rank-*.log"))
    assert re.search(r"could not be written by rank \d on n\d \(.*No space left", logs), logs
    assert "could not write" in job.log
    assert scene.cluster.restarts(job.number) == 0
    last = load_checkpoint(job.run_dir / "checkpoints" / "last.ckpt")
    assert STOP - SAVED <= last["global_step"] < STEPS  # saving at step STOP may have failed
    filler.unlink()
    again = scene.submit()
    again.finish()
    scene.assert_same_result(again)


@pytest.mark.parametrize("option", [["--resume", "a.ckpt"], ["--resume=last"]])
def test_a_checkpoint_that_the_job_would_not_continue_from_is_refused(tmp_path, option):
    program = tmp_path / "stu-train"
    program.touch(0o755)
    variables = {"JOB_ID": 7, "NTASKS_PER_NODE": 1, "CPUS_PER_TASK": 1}
    environment = {f"SLURM_{name}": str(value) for name, value in variables.items()}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "slurm" / "train.sbatch"), "--run-dir", "runs/a", *option]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(command, env=environment, **options)
    assert done.returncode == 2, done.stderr
    assert "leave --resume out" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["stu-train"]


FAKES = {
    "stu-plan": "exit ${PLAN_CODE:-0}",
    "stu-train": "",
    "scontrol": """case $* in
requeue*) echo "$2" >>requeued; exit 1 ;;
"show hostnames"*) echo "$3" ;;
*"show job"*) echo "JobId=7 ExcNodeList=(null) Restarts=30" ;;
esac""",
    "sinfo": "printf 'n%s\\n' 1 2 3",
    "srun": """case $* in
*stu-health*) echo "$*" >health; echo "$HEALTH_LOG"; exit ${HEALTH_CODE:-0} ;;
*) echo "$RANK_LOG" >>stu-train-7/rank-0.log; exit ${RANK_CODE:-0} ;;
esac""",
}
"""Programs of a job that is not requeued in the end, since its script would wait for that."""


@pytest.fixture
def fake_job(tmp_path):
    """Function that runs the script with `FAKES`, and returns its exit code, what it printed, and
    whether it asked to be requeued."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STU_MOST_RESTARTS": "1"}
    variables = {"JOB_ID": 7, "JOB_NUM_NODES": 1, "JOB_NODELIST": "n1", "RESTART_COUNT": 30}
    variables |= {"NTASKS_PER_NODE": 1, "CPUS_PER_TASK": 1, "JOB_PARTITION": "all"}
    environment |= {f"SLURM_{name}": str(value) for name, value in variables.items()}
    command = ["bash", str(ROOT / "slurm" / "train.sbatch")]

    def run(**more):
        (tmp_path / "requeued").unlink(missing_ok=True)
        more = {name: str(value) for name, value in more.items()}
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60}
        done = subprocess.run(command, env={**environment, **more}, **options)
        printed = done.stdout + done.stderr
        return done.returncode, printed, (tmp_path / "requeued").exists()

    return run


def test_only_restarts_of_starts_that_saved_nothing_are_counted(fake_job, tmp_path):
    """A long run is requeued any number of times, and one that fails again and again is not."""

    def is_requeued(code, log, **more):
        ended, printed, requeued = fake_job(RANK_CODE=code, RANK_LOG=log, **more)
        assert ended == 1, printed
        return requeued

    assert is_requeued(0, "", HEALTH_CODE="137"), "the network may be down for a while"
    (tmp_path / "stu-train-7" / "failures").unlink()
    saved = "stopped at step 5 of 9 for SIGUSR1; the checkpoint is written"
    assert [is_requeued(75, saved) for _ in range(3)] == [True] * 3
    assert is_requeued(75, "ended by SIGUSR1 outside of training")
    assert is_requeued(75, saved)
    assert not is_requeued(75, "ended by SIGUSR1 outside of training")
    assert not is_requeued(3, "a fault")


@pytest.mark.parametrize("code", [1, 2, 137])
def test_a_node_that_the_first_task_names_is_excluded_whatever_the_code(fake_job, code):
    """srun returns the largest code of all tasks, and a node without the program ends with 2."""
    _, printed, is_requeued = fake_job(HEALTH_LOG="stu-health: bad node: n1", HEALTH_CODE=code)
    assert is_requeued, printed
    assert "to continue without n1" in printed


def test_a_refusal_of_health_ends_the_job(fake_job):
    code, printed, is_requeued = fake_job(HEALTH_LOG="stu-health: refused, ..", HEALTH_CODE=2)
    assert (code, is_requeued) == (2, False), printed


def test_a_health_task_that_hangs_is_ended_after_the_verdict(fake_job, tmp_path):
    """Once a task has ended, the first one may still wait for the reports of others."""
    fake_job()
    seconds = int(re.search(r"--wait=(\d+)", (tmp_path / "health").read_text())[1])
    assert TIMEOUT_SECONDS < seconds <= 2 * TIMEOUT_SECONDS


@pytest.mark.parametrize(
    ("plan_code", "code", "requeued"), [(1, 1, False), (2, 2, False), (3, 1, True), (137, 1, True)]
)
def test_a_job_is_requeued_after_a_crash_of_the_plan(fake_job, plan_code, code, requeued):
    ended, printed, is_requeued = fake_job(PLAN_CODE=plan_code)
    assert (ended, is_requeued) == (code, requeued), printed
    assert f"stu-plan ended with code {plan_code}" in printed


SCENARIOS = [
    saves_and_continues_when_its_time_is_up,
    is_not_repeated_after_a_refusal,
    *(
        pytest.param(scenario, marks=pytest.mark.slow)
        for scenario in (
            continues_after_a_rank_is_killed,
            is_requeued_when_its_time_is_up_before_training,
            owns_its_folder,
            continues_without_an_unfit_node,
            loses_little_when_the_disk_is_full,
        )
    ),
]


@pytest.fixture(scope="module")
def make_scene(cluster, settings, tmp_path_factory):
    with ThreadPoolExecutor() as pool:
        run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
        whole = pool.submit(train_without_slurm, settings, run_dir)
        yield lambda name: Scene(cluster, settings, tmp_path_factory.mktemp(name), whole)


@pytest.fixture(scope="module")
def started(make_scene, request):
    """The results of the selected scenarios."""
    tests = [item for item in request.session.items if item.originalname == test_a_job.__name__]
    scenarios = [test.callspec.params["scenario"] for test in tests]
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        yield {scenario: pool.submit(scenario, make_scene("scene")) for scenario in scenarios}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_job(scenario, started):
    started[scenario].result()


@pytest.fixture
def scene(make_scene, started):
    """A scene while no scenario is in progress."""
    wait(started.values())
    made = make_scene("alone")
    yield made
    made.cluster.call("scancel", "--user=root")


@pytest.mark.slow
def test_a_preempted_job_saves_and_continues(scene):
    """Slurm signals the ranks alone, by SIGTERM, when the grace time begins."""
    job = scene.submit()
    job.wait_for_step(STOP)
    urgent = scene.cluster.submit(
        *("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    )
    job.finish()
    assert scene.cluster.state(urgent) == "COMPLETED"
    assert "requeued: preempted while training, with code 143" in job.log
    assert scene.cluster.restarts(job.number) >= 1  # it may begin again before the urgent job does
    stopped = int(re.findall(r"stopped at step (\d+) of", job.log)[0])
    assert (job.run_dir / "checkpoints" / f"step-{stopped:08d}.ckpt").exists()
    scene.assert_same_result(job)


@pytest.mark.slow
def test_a_job_continues_after_a_node_is_lost(scene):
    job = scene.submit()
    job.wait_for_step(STOP)
    scene.cluster.kill_node("n2")
    until(lambda: scene.cluster.restarts(job.number), lambda: job.log)
    scene.cluster.start_node("n2")
    job.finish()
    scene.assert_same_result(job)
