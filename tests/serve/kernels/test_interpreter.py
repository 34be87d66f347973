"""Triton's interpreter runs the kernels on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from serve.kernels.dispatch import HAS_TRITON

LARGE = (
    "300-32-1-66 or 256-20-66 or (window_attention and dtype1) or (near_field and dtype0)"
    " or (page_end and dtype0 and 36) or (page_end and dtype1 and 37)"
)
"""The largest sizes, and one type of numbers, which take longer than all others together."""


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the CUDA device")
@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("test_kernels.py", f"triton and not ({LARGE})"),
        pytest.param("test_kernels.py", f"triton and ({LARGE})", marks=pytest.mark.slow),
        pytest.param("test_engine_on_kernels.py", "triton", marks=pytest.mark.slow),
    ],
)
def test_kernels_in_the_interpreter(name, chosen):
    """In a process of its own, as Triton chooses when it is imported."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", chosen]
    path = Path(__file__).with_name(name)
    command += [path] if "engine" in name else ["--noconftest", path]  # it imports the server
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
