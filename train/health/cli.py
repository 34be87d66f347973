"""`stu-health`: whether the nodes of a SLURM job are fit to train.

One task on each node: `srun --ntasks-per-node=1 stu-health`. Each looks at itself, tells the first
one, and all add up a number together. A node that is not fit is named on a line of its own, which
`slurm/train.sbatch` reads to go on without it; what is wrong with all of them, or with the settings
of the run, ends the job.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from stu.common.cli import ArgumentParser, run_command
from train.health.verdict import (
    Answer,
    Verdict,
    as_dict,
    facts_of_node,
    folder_problem,
    folders_of,
    judge,
    probe_name,
)
from train.start.agreement import discovery_port

ADDED_NUMBERS = 2**20
NVIDIA = "0x10de"
"""As a vendor on the PCI bus."""
CLOCKS_APART_SECONDS = 5.0
READ_SECONDS = timedelta(seconds=10)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. 0: all nodes are fit; 1: one is not; 2: no other node would be, either."""
    parser = ArgumentParser(
        prog="stu-health",
        usage="stu-health --folder DIR [options] [-- settings of stu-train]",
        description="Check the nodes of a SLURM job: srun --ntasks-per-node=1 stu-health. Of the "
        "settings, run_dir and data.dir are checked too.",
    )
    add = parser.add_argument
    add("--folder", metavar="DIR", type=Path, required=True, help="that nodes must share")
    add("--min-free-gib", type=float, default=4.0, help="of memory, on each node")
    add("--timeout-seconds", type=float, default=120.0, help="for all nodes to answer")
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    given = parser.parse_args(arguments[:end])
    return run_command(
        "stu-health",
        lambda: check(
            given.folder, given.min_free_gib, given.timeout_seconds, arguments[end + 1 :]
        ),
    )


def check(
    folder: Path, min_free_gib: float, timeout_seconds: float, settings: Sequence[str] = ()
) -> int:
    """This task's part; the first one names nodes that are not fit. 0, 1 or 2."""
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    rank, count = int(os.environ.get("SLURM_PROCID", 0)), int(os.environ.get("SLURM_NTASKS", 1))
    run_dir, data_dir = folders_of(settings) if settings else (str(folder), None)
    answer = Answer(node, list(local_problems(min_free_gib)), facts=facts_of_node(data_dir))
    shared = list(dict.fromkeys([folder, Path(run_dir)]))
    verdict = _together(rank, count, answer, shared, timeout_seconds)
    if rank == 0:
        for told in verdict.told:
            _say(told)
        for name in verdict.bad:
            _say(f"bad node: {name}")
        if verdict.code == 0:
            _say(f"{count} nodes are fit")
    return verdict.code


def local_problems(min_free_gib: float) -> Iterator[str]:
    """What is wrong with this node."""
    import psutil
    import torch

    free_gib = psutil.virtual_memory().available / 2**30
    if free_gib < min_free_gib:
        yield f"{free_gib:.1f} GiB of memory are free, and {min_free_gib:g} are needed"
    if given := [its for its in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if its]:
        # Where there is none at all, SLURM's are only names, and the run is for the CPU.
        if _has_nvidia_gpus() and torch.cuda.device_count() != len(given):
            yield f"{torch.cuda.device_count()} GPUs answer of {len(given)} that SLURM gave"
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            if free < 0.9 * total:
                yield f"GPU {number} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _together(
    rank: int, count: int, answer: Answer, shared: Sequence[Path], timeout_seconds: float
) -> Verdict:
    """All nodes' answers at the first one, and a sum over all: what follows, for all of them."""
    import torch
    from torch import distributed
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    names = _node_names(count)
    timeout = timedelta(seconds=timeout_seconds)
    store = TCPStore(names[0], discovery_port(), count, rank == 0, timeout, wait_for_workers=False)
    probe = probe_name()
    if rank == 0:  # first, so that the others can look for it
        _check_folders(answer, shared, probe, probe)
        store.set("token", "" if answer.folders else probe)
    else:
        _check_folders(answer, shared, store.get("token").decode(), probe)
    store.set(f"answer/{rank}", json.dumps(as_dict(answer)))
    if rank == 0:
        deadline = time.monotonic() + timeout_seconds
        answers, silent = [], []
        for number, name in enumerate(names):
            left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
            try:
                store.wait([f"answer/{number}"], left)
            except distributed.DistStoreError:
                silent.append(name)
            else:
                answers.append(Answer(**json.loads(store.get(f"answer/{number}"))))
        for folder in shared:
            with suppress(OSError):
                (folder / probe).unlink()
        verdict = judge(answers, silent)
        verdict.told += [f"{its}: no answer within {timeout_seconds:g} seconds" for its in silent]
        store.set("verdict", json.dumps(as_dict(verdict)))
    verdict = Verdict(**json.loads(store.get("verdict")))
    if verdict.code:
        store.set(f"read/{rank}", "")
        if rank == 0:  # with it goes the store
            there = [number for number, name in enumerate(names) if name not in silent]
            with suppress(distributed.DistStoreError):
                store.wait([f"read/{number}" for number in there], READ_SECONDS)
        return verdict
    # Over the network that training uses, if NCCL has one.
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=count, timeout=timeout
    )
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    numbers = torch.ones(ADDED_NUMBERS, device=device)
    distributed.all_reduce(numbers)
    clocks = [torch.zeros(1, dtype=torch.float64, device=device) for _ in range(count)]
    distributed.all_gather(clocks, torch.tensor([time.time()], dtype=torch.float64, device=device))
    distributed.barrier()
    distributed.destroy_process_group()
    if float(numbers.sum()) != count * ADDED_NUMBERS:
        _say(f"{answer.node}: a sum over all nodes came out wrong")
        _say(f"bad node: {answer.node}")
        return Verdict(1)
    middle = sorted(float(clock) for clock in clocks)[count // 2]
    for name, clock in zip(names, clocks, strict=True):
        if abs(float(clock) - middle) > CLOCKS_APART_SECONDS:
            verdict.told.append(f"{name}: its clock is {float(clock) - middle:+.1f} seconds off")
            verdict.bad.append(name)
    verdict.code = int(bool(verdict.bad))
    return verdict


def _check_folders(answer: Answer, shared: Sequence[Path], token: str, probe: str) -> None:
    for folder in shared:
        for problem in folder_problem(folder, token, probe):
            answer.folders[str(folder)] = problem


def _has_nvidia_gpus() -> bool:
    """By the bus, whatever became of the driver."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == NVIDIA for vendor in vendors)


def _node_names(count: int) -> list[str]:
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if nodes is None:
        return ["127.0.0.1"] * count
    command = ["scontrol", "show", "hostnames", nodes]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    return shown.stdout.split()


def _say(message: str) -> None:
    print(f"stu-health: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
