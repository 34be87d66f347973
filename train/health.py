"""`stu-health`: whether the nodes of a SLURM job are fit to train.

One task on each node: `srun --ntasks-per-node=1 stu-health`. Each looks at itself, tells the first
one, and all add up a number together. A node that is not fit is named on a line of its own, which
`slurm/train.sbatch` reads to go on without it.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from stu.arguments import ArgumentParser, run_command

ADDED_NUMBERS = 2**20
NVIDIA = "0x10de"
"""As a vendor on the PCI bus."""
CLOCKS_APART_SECONDS = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. 0: all nodes are fit; 1: one is not; 2: wrong settings."""
    parser = ArgumentParser(
        prog="stu-health",
        description="Check the nodes of a SLURM job: srun --ntasks-per-node=1 stu-health",
    )
    add = parser.add_argument
    add("--folder", metavar="DIR", type=Path, required=True, help="that must be writable")
    add("--min_free_gib", type=float, default=4.0, help="of memory, on each node")
    add("--timeout_seconds", type=float, default=120.0, help="for all nodes to answer")
    given = parser.parse_args(argv)
    return run_command(
        "stu-health", lambda: check(given.folder, given.min_free_gib, given.timeout_seconds)
    )


def check(folder: Path, min_free_gib: float, timeout_seconds: float) -> int:
    """This task's part; the first one names nodes that are not fit. 0 or 1."""
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    rank, count = int(os.environ.get("SLURM_PROCID", 0)), int(os.environ.get("SLURM_NTASKS", 1))
    problems = list(local_problems(folder, min_free_gib))
    for problem in problems:
        _say(f"{node}: {problem}")
    if problems:
        _say(f"bad node: {node}")
    bad = _together(node, rank, count, not problems, timeout_seconds)
    if rank == 0 and not bad:
        _say(f"{count} nodes are fit")
    return 1 if bad or problems else 0


def local_problems(folder: Path, min_free_gib: float) -> Iterator[str]:
    """What is wrong with this node."""
    import psutil
    import torch

    probe = folder / f".stu-health-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        yield f"{folder} cannot be written ({error})"
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


def _together(node: str, rank: int, count: int, is_fit: bool, timeout_seconds: float) -> list[str]:
    """All nodes' answers at the first one, and a sum over all: nodes that are not fit, or did not
    answer in time."""
    import torch
    from torch import distributed
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    names = _node_names(count)
    port = 20_000 + int(os.environ.get("SLURM_JOB_ID", os.getpid())) % 20_000
    timeout = timedelta(seconds=timeout_seconds)
    store = TCPStore(names[0], port, count, rank == 0, timeout, wait_for_workers=False)
    store.set(f"fit/{rank}", "yes" if is_fit else "no")
    if rank == 0:
        deadline = time.monotonic() + timeout_seconds
        bad = []
        for number, name in enumerate(names):
            left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
            try:
                store.wait([f"fit/{number}"], left)
            except distributed.DistStoreError:
                _say(f"{name}: no answer within {timeout_seconds:g} seconds")
                _say(f"bad node: {name}")
                bad.append(name)
            else:
                if store.get(f"fit/{number}") != b"yes":
                    bad.append(name)
        store.set("bad", ",".join(bad))
    bad = [name for name in store.get("bad").decode().split(",") if name]
    if bad:
        return bad
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
        _say(f"{node}: a sum over all nodes came out wrong")
        bad.append(node)
    middle = sorted(float(clock) for clock in clocks)[count // 2]
    for name, clock in zip(names, clocks, strict=True):
        if abs(float(clock) - middle) > CLOCKS_APART_SECONDS:
            if rank == 0:
                _say(f"{name}: its clock is {float(clock) - middle:+.1f} seconds off")
                _say(f"bad node: {name}")
            bad.append(name)
    return bad


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
