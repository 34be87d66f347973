"""Kernels compile ahead of time, without a GPU and without spills."""

import json

import pytest
import torch

from benchmarks.recorded import RESULTS

triton = pytest.importorskip("triton")
from benchmarks import kernels  # noqa: E402

LARGE = kernels.Options(width=8192, num_heads=32, rank=64, page_len=256, window_tokens=32768)
ODD = kernels.Options(width=897, num_heads=13, mlp_ratio=3, rank=47, page_len=2, window_tokens=99)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
def test_resources_are_those_of_the_result():
    measured = kernels.measure(kernels.Options())["runs"]
    assert all(run["spilled_bytes"] == run["stack_bytes"] == 0 for run in measured)
    names = {run["kernel"].removesuffix("_fp8").removesuffix("_narrow") for run in measured}
    assert names == set(kernel_names())
    result = json.loads((RESULTS / "kernels.json").read_text(encoding="utf-8"))
    if result["machine"]["triton"] == triton.__version__:
        assert measured == result["runs"], "run python -m benchmarks kernels"


@pytest.mark.parametrize("options", [LARGE, pytest.param(ODD, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)]
)
def test_no_kernel_of_another_shape_spills(options, dtype):
    for launch in kernels.launches(options, dtype):
        if launch.is_fp8 or (launch.name == "narrow_product" and dtype == torch.float64):
            continue  # much as int8, and not in float64
        resources = kernels.compiled(launch, 90)
        assert resources["spilled_bytes"] == resources["stack_bytes"] == 0, launch.kernel


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", [1, 16, 32, 256])
def test_products_of_no_batch_spill_or_take_too_much_shared_memory(dtype, batch):
    for launch in kernels.launches(kernels.Options(batch=batch), dtype):
        for architecture in kernels.ARCHITECTURES:
            if launch.name == "narrow_product":
                resources = kernels.compiled(launch, architecture)
                assert resources["spilled_bytes"] == resources["stack_bytes"] == 0
                assert resources["shared_bytes"] <= 160 * 1024, "as much as an A100 has"


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current one."""
    entered = []

    class Device:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            entered.append(self.tensor)

        def __exit__(self, *_):
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device_of", Device)
    tensors = []
    monkeypatch.setattr(kernels, "Launch", lambda *_: tensors.append(entered[-1]))
    kernels.launches(kernels.Options(), torch.float32)
    assert len(tensors) == len(set(kernel_names())) + 3, "two products of fp8, and narrow states"
    assert all(tensor is not None for tensor in tensors)


def kernel_names():
    """Yield the kernels that are launched; others are called by them."""
    for module in kernels.MODULES:
        for value in vars(module).values():
            if isinstance(value, triton.JITFunction) and value.__name__ != "_tanh":
                yield kernels.name_of(value)
