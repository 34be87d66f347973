"""Modules that run kernels equal the model's own."""

import pytest
import torch

from serve.kernels.modules import KernelGatedMLP, KernelRMSNorm
from stu.config import ModelConfig
from stu.layers import GatedMLP, RMSNorm


@pytest.mark.parametrize("shape", [(1, 20), (3, 5, 20)])
@torch.no_grad()
def test_modules_equal_the_models(shape):
    torch.manual_seed(0)
    mlp, norm = GatedMLP(ModelConfig(50, width=20, num_heads=4)).double(), RMSNorm(20, 1e-5)
    norm.weight.normal_()
    x = torch.randn(shape, dtype=torch.float64)
    expected = mlp(x), norm(x)
    fused = KernelGatedMLP(mlp)
    for found, wanted in zip((fused(x), KernelRMSNorm(norm)(x)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mlp(x), expected[0], rtol=1e-12, atol=1e-14)
    assert mlp.up.weight.untyped_storage().data_ptr() == fused.gate_up.data_ptr()
