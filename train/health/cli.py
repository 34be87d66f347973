"""`stu-health`: find the nodes of a SLURM job that are not fit to train.

One task per node (`srun --ntasks-per-node=1 stu-health`) checks its node and reports to the first
task; then all tasks add up numbers over the network. Each node that is not fit is named on a line
of its own, from which `slurm/train.sbatch` excludes it. A problem that half of the nodes or more
have ends the job.
"""

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from stu.common.cli import ArgumentParser, run_command
from train.health.meeting import Meeting
from train.health.node import facts_of_node, folders_of, local_problems
from train.health.verdict import Report

TIMEOUT_SECONDS = 120.0
"""Default of `--timeout-seconds`; `slurm/train.sbatch` waits longer than that for hung tasks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if all nodes are fit, 1 if some are not, 2 if other nodes
    would not help."""
    parser = ArgumentParser(
        prog="stu-health",
        usage="stu-health --folder DIR [options] [-- settings of stu-train]",
        description="Check the nodes of a SLURM job before training: srun --ntasks-per-node=1 "
        "stu-health. Given the settings of stu-train, it also checks the run folder and the data.",
    )
    add = parser.add_argument
    add("--folder", metavar="DIR", type=Path, required=True, help="Folder shared by all nodes.")
    add("--min-free-gib", type=float, default=4.0, help="Minimum free memory per node, in GiB.")
    add(
        "--timeout-seconds",
        type=float,
        default=TIMEOUT_SECONDS,
        help="Seconds within which nodes must report.",
    )
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:end])
    return run_command(
        "stu-health",
        lambda: check(
            options.folder, options.min_free_gib, options.timeout_seconds, arguments[end + 1 :]
        ),
    )


def check(
    folder: Path, min_free_gib: float, timeout_seconds: float, settings: Sequence[str] = ()
) -> int:
    """Check this node together with the others, and return the exit code.

    The task of the first node prints the problems, and the nodes that are not fit.
    """
    rank, count = int(os.environ.get("SLURM_PROCID", 0)), int(os.environ.get("SLURM_NTASKS", 1))
    run_dir, data_dir = folders_of(settings) if settings else (folder, None)
    report = Report(
        os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        list(local_problems(min_free_gib)),
        facts=facts_of_node(data_dir),
    )
    meeting = Meeting(rank, count, timeout_seconds)
    verdict = meeting.judge(report, list(dict.fromkeys([folder, run_dir])))
    if verdict.code == 0:
        verdict = meeting.check_network()
    if rank == 0:
        lines = [*verdict.problems, *(f"bad node: {node}" for node in verdict.bad_nodes)]
        for line in lines or [f"all nodes are fit ({count})"]:
            print(f"stu-health: {line}", file=sys.stderr, flush=True)
    return verdict.code


if __name__ == "__main__":
    sys.exit(main())
