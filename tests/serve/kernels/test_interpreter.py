"""Triton's interpreter runs the kernels on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from serve.kernels.dispatch import HAS_TRITON


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the CUDA device")
@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("test_kernels.py", "triton and not 300-32-1-66"),  # which takes as long as all others
        pytest.param("test_kernels.py", "300-32-1-66", marks=pytest.mark.slow),
        pytest.param("test_engine_on_kernels.py", "triton", marks=pytest.mark.slow),
    ],
)
def test_kernels_in_the_interpreter(name, chosen):
    """In a process of its own, as Triton chooses when it is imported."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", chosen]
    command.append(Path(__file__).with_name(name))
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
