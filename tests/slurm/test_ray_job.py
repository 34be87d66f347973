"""slurm/ray.sbatch."""

import os
import subprocess
import sys

import pytest

from tests.serve.conftest import read_rows, write_rows
from tests.slurm.conftest import ROOT, read_logs

RAY = """#!{python}
from ray.scripts.scripts import main
main()
"""
NUM_ROWS = 200
FAKES = {
    "ray": "exit 1",
    "srun": "exit 1",
    "python": "echo 127.0.0.1",
    "stu-generate": 'echo "$@" >>"$LOG"; exit 2',
    "scontrol": 'echo "$@" >>"$LOG"; exit 1',
}
"""Programs of a node whose Ray does not start; a script that is requeued would wait for its end."""


def test_a_job_whose_cluster_does_not_start_is_requeued(tmp_path):
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(log),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
    }
    command = ["bash", str(ROOT / "slurm" / "ray.sbatch"), "stu-generate", "m", "--ray"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, log.read_text()) == (69, "requeue 7\n")
    assert "the Ray cluster did not start\nstu-generate ended with code 69" in done.stderr


@pytest.mark.slow
def test_a_job_decodes_a_dataset_on_a_ray_cluster_of_its_two_nodes(
    cluster, tmp_path, model_directory
):
    pytest.importorskip("ray")
    source, target, programs = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "bin"
    write_rows(source, [{"id": f"r{n}", "prompt": f"def f{n}("} for n in range(NUM_ROWS)])
    programs.mkdir()
    (programs / "ray").write_text(RAY.format(python=sys.executable))
    (programs / "ray").chmod(0o755)
    path = f"{programs}:{cluster.environment['PATH']}"
    job = cluster.submit(
        *("--nodes=2", "--cpus-per-task=1", "--gpus-per-node=0", "--mem=2G", "--time=10"),
        *(f"--export=ALL,PATH={path},STU_OBJECT_STORE_BYTES=80000000", f"--chdir={tmp_path}"),
        *(ROOT / "slurm" / "ray.sbatch", "stu-generate", model_directory, "--ray"),
        *("--input", source, "--output", target, "--cache-gib", "0.01", "--max-new-tokens", "3"),
    )
    assert cluster.wait(job) == "COMPLETED", read_logs(tmp_path)
    assert sorted(row["row"] for row in read_rows(target)) == [*range(NUM_ROWS)]
    assert "not all of 2 nodes joined" not in read_logs(tmp_path)
