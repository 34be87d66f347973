"""How the processes of a run were started: a run has as many ranks as its settings ask for."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities import rank_zero_only

from stu.common.errors import UserError

SHELLS = ("bash", "interactive")
"""Names that Slurm gives to jobs which are a shell."""
TORCH_PORTS, DISCOVERY_PORTS = range(15_000, 25_000), range(25_000, 32_000)
"""Ports for torch's process group in a Slurm step, and for what comes before it: below those that
systems hand out."""
TERMINAL = "/dev/tty"
"""File that only a process with a terminal can open."""


class Slurm(SLURMEnvironment):
    """Lightning's view of a Slurm step whose numbers `Launch.check` has accepted."""

    def __init__(self) -> None:
        # Lightning would save in the signal handler, which can block for ever.
        super().__init__(auto_requeue=False)

    @property
    def main_address(self) -> str:
        """Node of the first rank, which need not be the job's first node."""
        nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "127.0.0.1"))
        return os.environ.setdefault("MASTER_ADDR", self.resolve_root_node_address(nodes))

    @property
    def main_port(self) -> int:
        """Port of the process group, which steps of a job that share a node do not share."""
        return int(os.environ.setdefault("MASTER_PORT", str(_port_of_step(TORCH_PORTS))))

    @staticmethod
    def _validate_srun_variables() -> None:
        """Accept `--ntasks` without `--ntasks-per-node` too."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Leave the check to `Launch.check`."""


class Torchrun(TorchElasticEnvironment):
    """Lightning's view of ranks of torchrun whose numbers `Launch.check` has accepted."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Leave the check to `Launch.check`."""


@dataclass(frozen=True)
class Launch:
    """Processes that were started for a run, and this one's place among them."""

    kind: Literal["slurm step", "slurm allocation", "torchrun", "alone"]
    rank: int = 0
    local_rank: int = 0
    num_ranks: int = 1
    """Number of ranks that run now. If 1, Lightning may start more on this machine."""
    num_nodes: int = 1
    ranks_per_node: tuple[int, ...] = (1,)
    """Number of ranks on each node; empty if unknown."""
    allocated: int = 0
    """Number of tasks of an allocation that this process is no task of; 0 if unknown."""
    is_shell: bool = False
    """Whether the allocation is interactive, as by `salloc`."""

    def environment(self) -> ClusterEnvironment:
        """Return Lightning's object for this kind of launch."""
        kinds = {"slurm step": Slurm, "torchrun": Torchrun}
        return kinds.get(self.kind, LightningEnvironment)()

    def address(self) -> tuple[str, int]:
        """Return host and port where the ranks meet before training."""
        main = self.environment()
        if self.kind == "torchrun":
            return main.main_address, main.main_port + (0 if self.has_store() else 1)
        return main.main_address, discovery_port()

    def has_store(self) -> bool:
        """Return whether torchrun itself listens at `address`."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def check(self, devices: int, nodes: int) -> None:
        """Raise UserError unless `devices` ranks on each of `nodes` nodes were started."""
        asked = (
            f"trainer.devices={devices} x trainer.num_nodes={nodes} asks for {devices * nodes} "
            f"rank{'s' * (devices * nodes > 1)}"
        )
        srun = f"srun --nodes={nodes} --ntasks-per-node={devices} stu-train .."
        if self.kind == "slurm allocation":
            # The tasks of a batch script are meant as ranks. In a shell, the ranks of one machine
            # can be started from here.
            wrong = (
                devices < self.allocated if self.is_shell else {devices, self.allocated} - {0, 1}
            )
            if nodes > 1 or self.num_nodes > 1 or (self.allocated and wrong):
                tasks = f"{self.allocated} task{'s' * (self.allocated > 1)}"
                there = f"{tasks} on " if self.allocated else ""
                raise UserError(
                    message=f"{asked}, the Slurm allocation is for {there}{self.num_nodes} "
                    f"node{'s' * (self.num_nodes > 1)}, and this process was not started by srun: "
                    f"write {srun}"
                )
            return
        if self.kind == "alone":
            if nodes > 1 and "MASTER_ADDR" not in os.environ:
                raise UserError(
                    message=f"{asked}, and this process is the only one: start it on each node "
                    f"with {srun}, or with torchrun"
                )
            return
        is_even = self.ranks_per_node in ((), (devices,) * nodes)
        if devices * nodes == self.num_ranks and is_even:
            return
        per_node = sorted(set(self.ranks_per_node))
        write = "start "
        if len(per_node) == 1:
            here = f"--trainer.devices={per_node[0]} --trainer.num_nodes={self.num_nodes}"
            write = f"write {here}, or start "
        if self.kind == "torchrun":
            raise UserError(
                message=f"{asked}, and torchrun (RANK, WORLD_SIZE) started {self.num_ranks}: "
                f"{write}torchrun --nnodes={nodes} --nproc-per-node={devices}"
            )
        raise UserError(
            message=f"{asked}, and srun started {self.num_ranks} task{'s' * (self.num_ranks > 1)}, "
            f"{' and '.join(map(str, per_node))} a node on {self.num_nodes} "
            f"node{'s' * (self.num_nodes > 1)}: {write}{srun}"
        )

    def check_gpus(self, num_visible: int) -> None:
        """Raise UserError if this process does not see a GPU for each rank of its node."""
        here = max(self.ranks_per_node, default=1)
        if 0 < num_visible < here:
            sees = f"{num_visible} GPU{'s' * (num_visible > 1)}"
            fix = ""
            if self.kind == "slurm step":
                fix = ": if Slurm binds each task to its own, give --gpus-per-node instead of "
                fix += "--gpus-per-task, or srun --gpu-bind=none"
            message = f"{here} ranks run on a node, and each must see as many GPUs, but this one "
            raise UserError("trainer.devices", message=f"{message}sees {sees}{fix}")


def detect_launch(variables: Mapping[str, str] = os.environ) -> Launch:
    """Return how this process was started. Raises UserError if its launcher is not supported."""

    def number(name: str, default: int) -> int:
        return int(variables.get(name) or default)

    by_torchrun = "TORCHELASTIC_RUN_ID" in variables
    if by_torchrun or ("RANK" in variables and number("WORLD_SIZE", 1) > 1):
        if "LOCAL_RANK" not in variables:
            raise UserError(
                message=f"RANK={variables['RANK']} and WORLD_SIZE={variables['WORLD_SIZE']} are "
                "set, and LOCAL_RANK is not: start ranks with torchrun or srun, or unset all three"
            )
        count = number("WORLD_SIZE", 1)
        local = number("LOCAL_WORLD_SIZE", 0)
        nodes = number("GROUP_WORLD_SIZE", count // local if local else 1)
        per_node = (local,) * nodes if local and local * nodes == count else ()
        return Launch(
            "torchrun", number("RANK", 0), number("LOCAL_RANK", 0), count, nodes, per_node
        )
    # A shell in a pseudo-terminal is a step too: what it starts is alone. Jobs and steps that are
    # started from there have its variables, but no terminal.
    is_shell = "SLURM_PTY_PORT" in variables and _has_terminal()
    if "SLURM_STEP_ID" in variables and not is_shell:
        tasks = number("SLURM_STEP_NUM_TASKS", number("SLURM_NTASKS", 1))
        nodes = number("SLURM_STEP_NUM_NODES", number("SLURM_NNODES", 1))
        per_node = _expand(variables.get("SLURM_STEP_TASKS_PER_NODE", ""))
        return Launch(
            "slurm step",
            number("SLURM_PROCID", 0),
            number("SLURM_LOCALID", 0),
            tasks,
            nodes,
            per_node if sum(per_node) == tasks else (),
        )
    if number("OMPI_COMM_WORLD_SIZE", 1) > 1:
        raise UserError(
            message=f"mpirun started {variables['OMPI_COMM_WORLD_SIZE']} processes "
            "(OMPI_COMM_WORLD_SIZE), each of which would be a run alone: start them with srun or "
            "torchrun"
        )
    if "SLURM_JOB_ID" in variables or "SLURM_NTASKS" in variables:
        nodes = number("SLURM_JOB_NUM_NODES", number("SLURM_NNODES", 1))
        allocated = number("SLURM_NTASKS", 0)
        is_shell = is_shell or variables.get("SLURM_JOB_NAME") in SHELLS
        return Launch("slurm allocation", num_nodes=nodes, allocated=allocated, is_shell=is_shell)
    return Launch("alone")


def is_first_rank(launch: Launch) -> bool:
    """Return whether this process is the first rank of its run, which may start the others."""
    by_lightning: int = rank_zero_only.rank  # type: ignore[attr-defined]
    return launch.rank == by_lightning == int(os.environ.get("NODE_RANK") or 0) == 0


def discovery_port() -> int:
    """Return a port that all tasks of a Slurm step agree on."""
    return _port_of_step(DISCOVERY_PORTS)


def _port_of_step(ports: range) -> int:
    job = int(os.environ.get("SLURM_JOB_ID", os.getpid()))
    step = int(os.environ.get("SLURM_STEP_ID", 0))
    # Steps of a job may run side by side, as may jobs of neighbouring numbers.
    return ports[(31 * job + step) % len(ports)]


def _has_terminal() -> bool:
    try:
        os.close(os.open(TERMINAL, os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _expand(per_node: str) -> tuple[int, ...]:
    """Return Slurm's `2(x3),1` as (2, 2, 2, 1)."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node)
    return tuple(int(tasks) for tasks, times in found for _ in range(int(times or 1)))
