"""Registers, shared memory and spills of the decoding kernels, compiled without a GPU.

Each kernel is compiled as a step of the hybrid model of 2.7 billion parameters launches it, for
three generations of GPUs. One that spills keeps numbers in memory that do not fit its registers.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from benchmarks.machine import describe, version
from benchmarks.recorded import Run
from serve.kernels import (
    alternating_field,
    gated,
    narrow_product,
    near_field,
    norm,
    page_end,
    window_attention,
)
from stu.attention import Scores

MODULES = (
    near_field,
    page_end,
    alternating_field,
    norm,
    gated,
    narrow_product,
    window_attention,
)
"""Modules of the kernels."""
ARCHITECTURES = {80: "A100", 90: "H100", 100: "B200"}
"""Compute capability, times ten, of each GPU."""
TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int8: "i8",
}
FP8_FROM = 89
"""Compute capability, times ten, from which GPUs have floats of 8 bits."""


@dataclass(frozen=True)
class Options:
    """Shape of the model whose step launches the kernels."""

    width: int = 1536
    """Model width."""
    num_heads: int = 24
    """Attention heads."""
    mlp_ratio: int = 12
    """Hidden width of the gated MLP, in units of `width`."""
    rank: int = 36
    """Rank of the spectral states."""
    page_len: int = 32
    """Positions of a page."""
    num_filters: int = 24
    """Spectral filters, of the full form."""
    window_tokens: int = 1024
    """Tokens that attention sees before the current one."""
    batch: int = 8
    """Rows of the batch."""


class Launch(NamedTuple):
    """A kernel and the arguments that it was launched with."""

    kernel: Any
    args: tuple[Any, ...]
    settings: dict[str, Any]

    @property
    def is_fp8(self) -> bool:
        """Whether it reads weights that are floats of 8 bits."""
        return bool(self.settings.get("IS_FLOAT"))

    @property
    def name(self) -> str:
        """Name of the kernel in results."""
        is_narrow = self.settings.get("IS_MIXED") is False
        return name_of(self.kernel) + "_fp8" * self.is_fp8 + "_narrow" * is_narrow


def measure(options: Options) -> Run:
    """Compile every kernel, in float32 for an H100 alone, and return its resources."""
    runs = []
    for dtype in (torch.bfloat16, torch.float32):
        for launch in launches(options, dtype):
            for architecture, gpu in ARCHITECTURES.items():
                is_usual = dtype == torch.bfloat16 or gpu == "H100"
                if is_usual and (not launch.is_fp8 or architecture >= FP8_FROM):
                    run = {"kernel": launch.name, "dtype": TYPES[dtype], "gpu": gpu}
                    runs.append(run | compiled(launch, architecture))
    return {"machine": describe() | {"triton": version("triton")}, "runs": runs}


def name_of(kernel: Any) -> str:
    """Return the name of a kernel."""
    name: str = kernel.__name__
    return name.strip("_").removesuffix("_kernel")


def launches(options: Options, dtype: torch.dtype) -> list[Launch]:
    """Return the launches of a step: each kernel's once, or once for each format of weights of 8
    bits, and for each form of an STU. Their tensors have no memory."""
    launched: list[Launch] = []

    class Recorder:
        """A kernel that is not run."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **settings: launched.append(Launch(self.kernel, args, settings))

    with ExitStack() as stack:
        for module in MODULES:
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction) and value.__module__ == module.__name__:
                    stack.enter_context(mock.patch.object(module, name, Recorder(value)))
        _launch_all(options, dtype)
    return launched


def _launch_all(options: Options, dtype: torch.dtype) -> None:
    def numbers(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, width, slots = options.batch, options.width, options.page_len // 2
    layers, rank, heads = 2, options.rank, options.num_heads
    wide = torch.promote_types(dtype, torch.float32)
    x, rows = numbers(batch, width), numbers(batch, dtype=torch.int64)
    inputs = numbers(layers, 2, slots, batch, width, dtype=wide).permute(3, 0, 1, 2, 4)
    near = numbers(layers, slots, width, dtype=wide)
    place = numbers(1, dtype=torch.int64)
    near_field.triton_near_field(inputs, inputs, near, 1, rows, place, x)
    states, decays, coefficients = (
        numbers(*shape, dtype=torch.float64)
        for shape in ((batch, layers, 2, rank, width), (slots + 1, rank), (layers, rank, width))
    )
    joined_at = numbers(batch, layers, dtype=torch.int64)
    page_end.triton_page_end(states, inputs, inputs, decays, coefficients, joined_at, place, rows)
    # The full form, whose states have two signals and a slot for every place.
    inputs = numbers(layers, 2, options.page_len, batch, width, dtype=wide).permute(3, 0, 1, 2, 4)
    narrow = numbers(batch, layers, 2, rank, width, dtype=wide)
    reach = numbers(options.page_len, options.num_filters, rank, dtype=wide)
    near = numbers(options.page_len, options.num_filters, options.page_len, dtype=wide)
    tables = narrow, reach, near
    alternating_field.triton_alternating_field(inputs, *tables, 1, rows, place, rows, x)
    into_narrow = numbers(rank, rank, dtype=torch.float64)
    pages = states, inputs, narrow, decays, into_narrow
    page_end.triton_page_end(*pages, joined_at, place, rows)
    norm.triton_add_norm(x, x, numbers(width), 1e-5)
    gated.triton_gated_product(numbers(batch, 2 * options.mlp_ratio * width))
    scales = numbers(width, dtype=torch.float32)
    for weights in (torch.int8, torch.float8_e4m3fn):
        values = numbers(width, width, dtype=weights)
        narrow_product.triton_narrow_product(x, values, scales)
    num_pages = options.window_tokens // options.page_len + 1
    pool = numbers(num_pages, layers, 2, options.page_len, heads, width // heads)
    windows = window_attention.RowWindows(numbers(batch, num_pages, dtype=torch.int64), rows, rows)
    queries, keys, values = numbers(batch, 3, heads, width // heads).unbind(1)
    scores = Scores(numbers(heads, dtype=torch.float32), options.window_tokens, 50.0)
    window_attention.triton_window_attention(pool, 1, windows, rows, queries, keys, values, scores)


def compiled(launch: Launch, architecture: int) -> Run:
    """Compile a kernel as it was launched; return its resources."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    settings = dict(launch.settings)
    stages = settings.pop("num_stages", 3)  # as Triton has it
    options = {"num_warps": settings.pop("num_warps"), "num_stages": stages}
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | settings
    for place, parameter in enumerate(launch.kernel.params):
        value = arguments[parameter.name]
        specializes = not parameter.do_not_specialize
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and specializes):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        is_tensor = isinstance(value, Tensor)
        signature[parameter.name] = f"*{TYPES[value.dtype]}" if is_tensor else "i32"
        if is_tensor or (value % 16 == 0 and specializes):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", architecture, 32)
    made = triton.compile(source, target=target, options=options)
    return {"warps": options["num_warps"], "shared_bytes": made.metadata.shared} | _resources(
        made.asm["ptx"], architecture
    )


def _resources(ptx: str, architecture: int) -> Run:
    """Assemble a kernel; return what the assembler says of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        target = re.search(r"\.target (\w+)", ptx)
        assert target, "PTX names its target"
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target[1]}", path]
        command += ["-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {
        "registers": re.search(r"Used (\d+) registers", said),
        "spilled_bytes": re.search(r"(\d+) bytes spill stores", said),
        "stack_bytes": re.search(r"(\d+) bytes stack frame", said),
    }
    return {name: int(match[1]) for name, match in found.items() if match}
