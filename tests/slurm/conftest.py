"""A cluster for all tests of this folder, and a model and data for its jobs."""

import os
import subprocess
from pathlib import Path

import psutil
import pytest

from tests import forked
from tests.serve.conftest import code_model, model_directory  # noqa: F401
from tests.slurm.cluster import SlurmCluster
from tests.train.conftest import data, train_settings  # noqa: F401

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    subprocess.run(["sh", ROOT / "tests" / "install_slurm.sh"], check=True)
    programs = Path(forked.program("stu-train")).parent
    made = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    made.environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    made.environment["OMP_NUM_THREADS"] = "1"
    try:
        made.start()
        yield made
    finally:
        made.stop()


def read_logs(folder):
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))


def find_clients(*words):
    """Return the processes (tests/forked/client.py) whose command lines have these words."""
    processes = [(process, process.info["cmdline"]) for process in psutil.process_iter(["cmdline"])]
    found = [process for process, command in processes if {*words} <= {*(command or ())}]
    return [process for process in found if "python" in process.info["cmdline"][0]]
