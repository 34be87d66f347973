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
    """Measure the machine's speeds for a moment and on small tensors."""
    monkeypatch.setattr("benchmarks.timing.LEAST_SECONDS", 0.0)
    monkeypatch.setattr("benchmarks.timing.LEAST_CALLS", 1)
    monkeypatch.setattr("benchmarks.decoding.rates.READ", 2**22)
    monkeypatch.setattr("benchmarks.decoding.rates.KEYS", 256)
    rates.operands.cache_clear()
    yield
    rates.operands.cache_clear()
