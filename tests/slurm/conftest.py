"""A cluster for all tests of this folder, and what training on it needs."""

import os
import subprocess
from pathlib import Path

import pytest

from tests import forked
from tests.slurm.cluster import SlurmCluster
from tests.train.conftest import data, module_settings  # noqa: F401

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two nodes with a GPU each, as far as Slurm knows."""
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons need root")
    subprocess.run(["sh", ROOT / "tests" / "install_slurm.sh"], check=True)
    made = SlurmCluster(tmp_path_factory.mktemp("slurm"), num_nodes=2, num_gpus=1)
    programs = Path(forked.program("stu-train")).parent
    made.environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    made.environment["OMP_NUM_THREADS"] = "1"
    try:
        made.start()
        yield made
    finally:
        made.stop()
