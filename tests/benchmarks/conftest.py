"""Fixtures for tests of the benchmarks."""

import pytest
import torch

from benchmarks.decoding import rates


@pytest.fixture(autouse=True)
def threads():
    """Restore the number of torch's threads, which benchmarks set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick_timing(monkeypatch):
    """Measure the machine's speeds on small tensors."""
    for name, value in {"READ": 2**22, "KEYS": 256, "MATRICES": rates.MATRICES[:4]}.items():
        monkeypatch.setattr(rates, name, value)
    rates.operands.cache_clear()
    yield
    rates.operands.cache_clear()
