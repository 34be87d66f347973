"""The choice between kernels and twins, and what twins must not do in a captured step."""

import logging

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from serve.kernels import dispatch
from serve.kernels.alternating_field import torch_alternating_field
from serve.kernels.gated import torch_gated_product
from serve.kernels.near_field import torch_near_field
from serve.kernels.norm import torch_add_norm
from serve.kernels.page_end import torch_page_end
from serve.kernels.window_attention import RowWindows, torch_window_attention
from stu.attention import Scores, alibi_slopes

WAITS = {"_local_scalar_dense", "nonzero", "item", "masked_select", "unique"}
"""Operations for which the host would wait for the device."""


class Operations(TorchDispatchMode):
    """The names of all operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class CudaTensor:
    is_cuda = True


def test_triton_runs_on_cuda_only(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._runs_on_cuda.cache_clear()
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    assert dispatch.uses_triton(CudaTensor())
    assert not dispatch.uses_triton(torch.zeros(1))
    dispatch._runs_on_cuda.cache_clear()


def test_missing_triton_is_logged_once(monkeypatch, caplog):
    dispatch._runs_on_cuda.cache_clear()
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with caplog.at_level(logging.WARNING):
        assert not any(dispatch.uses_triton(CudaTensor()) for _ in range(3))
    assert [record.message for record in caplog.records] == [
        "triton is not installed: decoding on CUDA runs torch code, which is slower"
    ]
    dispatch._runs_on_cuda.cache_clear()


def test_twins_wait_for_nothing():
    inputs, pending = torch.zeros(2, 3, 2, 2, 4, 5)
    states = torch.zeros(3, 2, 2, 6, 5, dtype=torch.float64)
    decays = torch.zeros(5, 6, dtype=torch.float64)
    coefficients = torch.zeros(2, 6, 5, dtype=torch.float64)
    narrow, into_narrow = torch.zeros(3, 2, 2, 3, 5), torch.zeros(3, 6, dtype=torch.float64)
    reach, near, ages = torch.zeros(4, 2, 3), torch.zeros(4, 2, 4), torch.tensor([1, 4])
    rows, number, x = torch.tensor([2, 0]), torch.tensor([1]), torch.zeros(2, 5)
    joined_at = torch.zeros(3, 2, dtype=torch.int64)
    windows = RowWindows(torch.zeros(3, 2, dtype=torch.int64), *torch.zeros(2, 3).long())
    pool, token = torch.zeros(2, 2, 2, 4, 1, 5), torch.zeros(2, 1, 5)
    scores = Scores(alibi_slopes(1), 4, 50.0)
    with Operations() as operations:
        torch_near_field(inputs, pending, torch.zeros(2, 4, 5), 1, rows, number, x)
        torch_page_end(states, inputs, pending, decays, coefficients, joined_at, number, rows)
        torch_alternating_field(inputs, narrow, reach, near, 1, rows, number, ages, x)
        torch_page_end(states, inputs, narrow, decays, into_narrow, joined_at, number, rows)
        torch_add_norm(x, x, torch.zeros(5), 1e-5)
        torch_gated_product(torch.zeros(2, 10))
        torch_window_attention(pool, 1, windows, rows, token, token, token, scores)
    assert len(operations.names) > 20
    assert not operations.names & WAITS
