"""Choice between Triton kernels and their twins in torch."""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
triton: Any = importlib.import_module("triton") if HAS_TRITON else None
tl: Any = importlib.import_module("triton.language") if HAS_TRITON else None

logger = logging.getLogger(__name__)


def jit(kernel: Callable[..., Any], unspecialized: Sequence[str] = ()) -> Any:
    """Return a kernel that Triton compiles; the function itself where Triton is missing, so that
    its file can be imported.

    unspecialized: Arguments for which Triton compiles no variants, by whether 16 divides them.
    """
    return triton.jit(kernel, do_not_specialize=list(unspecialized)) if HAS_TRITON else kernel


def uses_triton(tensor: Tensor) -> bool:
    """Return whether kernels run on this tensor in Triton: on CUDA, where Triton is installed.

    With TRITON_INTERPRET=1, Triton's interpreter runs them on the CPU too.
    """
    if tensor.is_cuda:
        return _runs_on_cuda()
    return HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def dense_rows(x: Tensor) -> Tensor:
    """Return `x [B, ..]`, whose rows may lie anywhere; a copy if their own numbers are not next to
    each other in order, as kernels read them."""
    return x if x[:1].is_contiguous() else x.contiguous()


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


@functools.cache
def _runs_on_cuda() -> bool:
    if not HAS_TRITON:
        logger.warning("triton is not installed: decoding on CUDA runs torch code, which is slower")
    return HAS_TRITON
