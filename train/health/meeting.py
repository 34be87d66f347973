"""Exchange of reports between the nodes of a job, and a sum over their network."""

import json
import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from train.health.node import folder_problem, probe_name
from train.health.verdict import Report, Verdict, judge

NUM_ADDED = 2**20
"""Numbers that are added up over all nodes."""
MOST_CLOCK_SECONDS = 5.0
"""Largest difference of a node's clock from the median."""
READ_SECONDS = timedelta(seconds=10)
"""Time for all tasks to read a verdict, after which the first one ends."""


class Meeting:
    """Tasks, one per node, that exchange values through a store that the first task serves."""

    def __init__(self, rank: int, count: int, timeout_seconds: float) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        from train.start.launch import discovery_port

        self._rank, self._nodes = rank, _node_names(count)
        self._timeout = timedelta(seconds=timeout_seconds)
        self._store = TCPStore(
            self._nodes[0],
            discovery_port(),
            count,
            rank == 0,
            self._timeout,
            wait_for_workers=False,
        )

    def judge(self, report: Report, folders: Sequence[Path]) -> Verdict:
        """Check that all nodes share `folders`, and return the verdict on the reports of all nodes.

        Problems with the folders are added to `report`.
        """
        store, probe = self._store, probe_name()
        # The first task writes before the others look for what it wrote.
        first_probe = probe if self._rank == 0 else store.get("probe").decode()
        for folder in folders:
            if problem := folder_problem(folder, first_probe, probe):
                report.folders[str(folder)] = problem
        if self._rank == 0:
            store.set("probe", "" if report.folders else probe)
        store.set(f"report/{self._rank}", json.dumps(asdict(report)))
        if self._rank == 0:
            verdict = self._collect()
            for folder in folders:
                with suppress(OSError):
                    (folder / probe).unlink()
            store.set("verdict", json.dumps(asdict(verdict)))
        verdict = Verdict(**json.loads(store.get("verdict")))
        if verdict.code:
            self._leave()
        return verdict

    def check_network(self) -> Verdict:
        """Add up numbers over the network that training uses, and compare the nodes' clocks."""
        import torch
        from torch import distributed

        backend, device = ("nccl", "cuda:0") if torch.cuda.is_available() else ("gloo", "cpu")
        count = len(self._nodes)
        distributed.init_process_group(
            backend, store=self._store, rank=self._rank, world_size=count, timeout=self._timeout
        )
        numbers = torch.ones(NUM_ADDED, device=device)
        distributed.all_reduce(numbers)
        num_wrong = float((numbers != count).sum())
        own = torch.tensor([time.time(), num_wrong], dtype=torch.float64, device=device)
        gathered = [torch.empty_like(own) for _ in range(count)]
        distributed.all_gather(gathered, own)
        distributed.barrier()
        distributed.destroy_process_group()
        clocks, wrong = torch.stack(gathered).T.tolist()  # [nodes, 2] -> [2, nodes]
        median = sorted(clocks)[count // 2]
        verdict = Verdict()
        for node, clock, num_wrong in zip(self._nodes, clocks, wrong, strict=True):
            if num_wrong:
                verdict.problems.append(f"{node}: a sum over all nodes came out wrong")
            if abs(clock - median) > MOST_CLOCK_SECONDS:
                verdict.problems.append(f"{node}: its clock is {clock - median:+.1f} seconds off")
            if num_wrong or abs(clock - median) > MOST_CLOCK_SECONDS:
                verdict.bad_nodes.append(node)
        return verdict

    def _collect(self) -> Verdict:
        """Wait for the reports of all nodes, and return the verdict."""
        from torch import distributed

        deadline = time.monotonic() + self._timeout.total_seconds()
        reports, silent = [], []
        for number, node in enumerate(self._nodes):
            left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
            try:
                self._store.wait([f"report/{number}"], left)
            except distributed.DistStoreError:
                silent.append(node)
            else:
                reports.append(Report(**json.loads(self._store.get(f"report/{number}"))))
        verdict = judge(reports, silent)
        seconds = self._timeout.total_seconds()
        verdict.problems += [f"{node}: no answer within {seconds:g} seconds" for node in silent]
        return verdict

    def _leave(self) -> None:
        """Return once all tasks have read the verdict, as the store ends with the first task."""
        from torch import distributed

        self._store.set(f"read/{self._rank}", "")
        if self._rank == 0:
            tasks = [n for n in range(len(self._nodes)) if self._store.check([f"report/{n}"])]
            with suppress(distributed.DistStoreError):
                self._store.wait([f"read/{number}" for number in tasks], READ_SECONDS)


def _node_names(count: int) -> list[str]:
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if nodes is None:
        return ["127.0.0.1"] * count
    command = ["scontrol", "show", "hostnames", nodes]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    return shown.stdout.split()
