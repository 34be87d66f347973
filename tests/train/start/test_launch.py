"""How a process was started, by its environment: a run has as many ranks as it asks for."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from stu.common.errors import UserError
from tests import forked
from train import config
from train.start import launch as launch_module
from train.start import launcher as launcher_module
from train.start.launch import Slurm, detect_launch, discovery_port
from train.start.launcher import Launcher

BATCH = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "wrap", "SLURM_NNODES": "1", "SLURM_PROCID": "0"}
SECONDS = 240
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_LOCALID": "0"}


def step(tasks, nodes, per_node, **more):
    """Return the variables of a step of srun."""
    numbers = {
        "SLURM_NTASKS": str(tasks),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_TASKS_PER_NODE": per_node,
    }
    return {**STEP, **numbers, **more}


def shell(name, **more):
    """Return the variables of a shell of salloc or of `srun --pty`."""
    return {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": name, "SLURM_NNODES": "1", **more}


def torchrun(ranks, local):
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(local),
        "GROUP_WORLD_SIZE": str(ranks // local),
    }


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "kind"),
    [
        ({}, 2, 1, "alone"),
        (step(1, 1, "1"), 1, 1, "slurm step"),
        (step(4, 2, "2(x2)"), 2, 2, "slurm step"),
        (step(2, 1, "2", SLURM_JOB_NAME="interactive"), 2, 1, "slurm step"),
        ({**BATCH, "SLURM_NTASKS": "1"}, 1, 1, "slurm allocation"),
        (BATCH, 2, 1, "slurm allocation"),  # for gpus, no number of tasks
        (shell("interactive"), 4, 1, "slurm allocation"),
        (shell("interactive", SLURM_NTASKS="2"), 2, 1, "slurm allocation"),
        (torchrun(4, 2), 2, 2, "torchrun"),
        # Within a job, torchrun's variables are the ones that count.
        ({**step(1, 1, "1"), **torchrun(2, 2)}, 2, 1, "torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1, 1, "alone"),
    ],
)
def test_matching_launch_is_accepted(variables, devices, nodes, kind):
    launch = detect_launch(variables)
    launch.check(devices, nodes)
    assert launch.kind == kind


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "message"),
    [
        # sbatch --ntasks=1 --wrap "stu-train --trainer.devices 2"
        (
            {**BATCH, "SLURM_NTASKS": "1"},
            2,
            1,
            "trainer.devices=2 x trainer.num_nodes=1 asks for 2 ranks, the Slurm allocation is for "
            "1 task on 1 node, and this process was not started by srun: write srun --nodes=1 "
            "--ntasks-per-node=2 stu-train ..",
        ),
        ({**BATCH, "SLURM_NTASKS": "2"}, 2, 1, "2 tasks on 1 node, .* not started by srun"),
        ({**BATCH, "SLURM_NTASKS": "2"}, 1, 1, "asks for 1 rank, .* 2 tasks on 1 node"),
        ({**BATCH, "SLURM_JOB_NUM_NODES": "2"}, 1, 1, "is for 2 nodes"),
        (step(1, 1, "1"), 2, 1, "asks for 2 ranks, and srun started 1 task, 1 a node on 1 node"),
        (
            step(2, 2, "1(x2)"),
            1,
            1,
            "asks for 1 rank, and srun started 2 tasks, 1 a node on 2 nodes: write "
            "--trainer.devices=1 --trainer.num_nodes=2, or start srun",
        ),
        (step(2, 2, "1(x2)"), 2, 1, "write --trainer.devices=1 --trainer.num_nodes=2"),
        (step(3, 2, "2,1"), 3, 1, "1 and 2 a node on 2 nodes: start srun"),
        (step(2, 1, "2", SLURM_JOB_NAME="interactive"), 1, 1, "srun started 2 tasks"),
        (shell("interactive", SLURM_NTASKS="2"), 1, 1, "write srun --nodes=1"),
        (shell("bash", SLURM_NNODES="2"), 1, 2, "write srun --nodes=2 --ntasks-per-node=1"),
        (torchrun(2, 2), 1, 1, "torchrun .* started 2: write --trainer.devices=2"),
        (torchrun(4, 2), 4, 1, "write --trainer.devices=2 --trainer.num_nodes=2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 1, 1, "started 2: start torchrun"),
        ({}, 1, 2, "this process is the only one"),
    ],
)
def test_fewer_or_more_ranks_are_refused(variables, devices, nodes, message):
    with pytest.raises(UserError, match=message):
        detect_launch(variables).check(devices, nodes)


@pytest.mark.parametrize(
    ("variables", "num_visible", "message"),
    [
        (step(4, 2, "2(x2)"), 1, "2 ranks run on a node, .* sees 1 GPU: .* --gpus-per-task"),
        (torchrun(8, 4), 2, "4 ranks run on a node, .* sees 2 GPUs$"),
    ],
)
def test_ranks_that_see_too_few_gpus_are_refused(monkeypatch, variables, num_visible, message):
    """As with `--gpus-per-task`; Lightning would count their GPUs by the number of the rank."""
    launch = detect_launch(variables)
    monkeypatch.setattr(config, "detect_launch", lambda: launch)
    trainer = SimpleNamespace(accelerator="gpu", devices=max(launch.ranks_per_node))
    for enough in (0, trainer.devices):  # without any, Lightning says so
        monkeypatch.setattr("torch.cuda.device_count", lambda: enough)  # noqa: B023
        config._check_devices(trainer, is_plan=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_visible)
    config._check_devices(trainer, is_plan=True)
    trainer.accelerator = "cpu"
    config._check_devices(trainer, is_plan=False)
    trainer.accelerator = "gpu"
    with pytest.raises(UserError, match=message):
        config._check_devices(trainer, is_plan=False)


@pytest.mark.parametrize(
    ("tasks", "has_terminal", "kind"),
    [
        (1, True, "slurm allocation"),  # in a shell of `srun --pty`
        (2, False, "slurm step"),  # by srun or sbatch from such a shell, whose variables they keep
        (1, False, "slurm step"),
    ],
)
def test_only_a_process_with_a_terminal_is_in_a_shell(
    monkeypatch, tmp_path, tasks, has_terminal, kind
):
    terminal = tmp_path / "tty"
    monkeypatch.setattr(launch_module, "TERMINAL", terminal)
    if has_terminal:
        terminal.touch()
    launch = detect_launch(step(tasks, 1, str(tasks), SLURM_JOB_NAME="bash", SLURM_PTY_PORT="9"))
    launch.check(2 if has_terminal else tasks, 1)
    assert launch.kind == kind


def test_steps_of_a_job_and_jobs_share_no_port(monkeypatch):
    ports = set()
    for variables in ("7", "0"), ("7", "1"), ("8", "0"):
        monkeypatch.setenv("MASTER_PORT", "")
        monkeypatch.delenv("MASTER_PORT")  # which is then as it was after the test
        for name, value in zip(("SLURM_JOB_ID", "SLURM_STEP_ID"), variables, strict=True):
            monkeypatch.setenv(name, value)
        ports |= {discovery_port(), Slurm().main_port}
    assert len(ports) == 6


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not"),
    ],
)
def test_unsupported_launch_is_refused(variables, message):
    with pytest.raises(UserError, match=message):
        detect_launch(variables)


def test_error_of_the_first_rank_ends_the_others(monkeypatch):
    """On a GPU, they would wait for it in a collective operation. They end with this process, as
    after an error of all ranks callbacks still have the last checkpoint to complete."""
    waiting = subprocess.Popen(["sleep", "600"])
    monkeypatch.setattr(launcher_module, "STOP_SECONDS", 0.0)
    monkeypatch.setattr(launcher_module, "_set_num_threads_if_needed", lambda num_processes: None)
    monkeypatch.setenv("MASTER_PORT", "1")
    launcher = Launcher(LightningEnvironment(), num_processes=2, num_nodes=1)
    for name in ("_call_children_scripts", "_watch"):
        monkeypatch.setattr(launcher, name, lambda: None)
    launcher.procs, at_exit = [waiting], []
    monkeypatch.setattr("atexit.register", at_exit.append)

    def train():
        raise RuntimeError("out of memory")

    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            launcher.launch(train)
        assert waiting.poll() is None
        for end in at_exit:
            end()
        assert waiting.wait(10) == -signal.SIGKILL
    finally:
        waiting.kill()


@pytest.mark.slow
def test_ranks_import_nothing_from_the_current_folder(settings, tmp_path, folder_of_namesakes):
    program = Path(sys.executable).with_name("stu-train")
    more = ["--trainer.devices=2", "--trainer.max_steps=1", f"--run-dir={tmp_path / 'run'}"]
    done = forked.run(program, *settings, *more)
    assert done.returncode == 0, done.stderr
    assert "trained to step 1 of 1" in done.stderr


@pytest.mark.slow
def test_signal_before_the_first_step_ends_all_ranks_of_one_machine(settings, tmp_path):
    """The first rank handles no signal while it waits for the other, which the signal has ended."""
    program = Path(sys.executable).with_name("stu-train")
    log = tmp_path / "log"
    variables = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    with log.open("w") as file:
        process = subprocess.Popen(
            [program, *settings, "--trainer.devices=2", f"--run-dir={tmp_path / 'run'}"],
            env={**variables, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            stderr=file,
        )
    try:
        first, deadline = psutil.Process(process.pid), time.monotonic() + SECONDS
        while not (others := first.children()):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(SECONDS) == 143, log.read_text()
        _, alive = psutil.wait_procs(others, SECONDS)
        assert not alive
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
