"""Counts of what the operations of a decoding step do: multiply-adds, and bytes moved.

Operations are watched while they run, so that any model and cache can be counted. Multiply-adds are
real ones; a real FFT of length n counts n log2 n. Those with keys that another query of the group
reads as well also count as shared. Bytes moved are those of tensors that outlive the step, and of
others that no processor cache holds, in every operation that reads or writes them; weights are
counted apart, as read once for the batch.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ["dense", "convolution", "fft", "attention", "recurrence"]
"""Kinds of multiply-adds: matrices of weights; within the convolution's cache; FFTs; other batched
products; sums and products, number by number."""
LARGE_BYTES = 2**21
"""Size from which a tensor made in the step counts as memory traffic."""
INT8 = "linear_with_input_q_dq_qweight_dq_output_fp32"
DENSE = {"mm": 0, "addmm": 1, "_linear_pointwise": 0, INT8: 0}
"""Products with weights, and the place of the other factor among the tensors."""
BATCHED = {"bmm", "baddbmm", "baddbmm_"}
FOURIER = {"_fft_r2c", "_fft_c2r"}
COPIES = {"embedding", "index", "index_select", "gather", "copy_", "clone", "_to_copy", "cat"}
"""Operations that read as much as they write, and multiply nothing."""
SCATTERS = {"index_put_", "index_copy_", "scatter_"}
"""Those that write their last tensor to some places of the first."""


def counted(step: Callable[[], object], in_convolution: Callable[[], bool]) -> Counter[str]:
    """Return the counts of a step of the batch.

    in_convolution: whether operations belong to the convolution's cache at the moment.
    """
    counter = _StepCounter(in_convolution)
    with counter:
        step()
    return counter.counts


def report(counts: Counter[str], batch: int, weight_bytes: int) -> dict[str, Any]:
    """Return the figures of a token from the counts of a step of the batch."""
    multiply_adds = {kind: counts[kind] / batch for kind in KINDS}
    moved = {"weights": weight_bytes / batch, "filters": 0.0}  # filters are read as caches are
    moved |= {name: counts[name] / batch for name in ("cache_read", "cache_written")}
    return {
        "multiply_adds_per_token": multiply_adds | {"total": sum(multiply_adds.values())},
        "bytes_moved_per_token": moved | {"total": sum(moved.values())},
        "streams_per_token": counts["streams"] / batch,
        "stream_bytes_per_token": counts["stream_bytes"] / batch,
        "shared_products_per_token": counts["shared"] / batch,
    }


class _StepCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, in_convolution: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self._in_convolution = in_convolution
        self._made: set[int] = set()
        """Addresses of tensors made in the step. What is made later at one of them is made too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            # With `out`, which is scratch memory, an operation makes a tensor as it does without.
            read = {key: value for key, value in kwargs.items() if key != "out"}
            self._count(func.overloadpacket.__name__, _tensors((args, read)), _tensors(result))
        return result

    def _count(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        in_place = name.endswith("_")
        if name in DENSE:
            self.counts["dense"] += outputs[0].numel() * inputs[DENSE[name]].shape[-1]
        elif inputs and outputs and (in_place or not _is_view(outputs[0], inputs)):
            self._count_numbers(name, inputs, outputs[0])
            self._count_bytes(name, inputs, outputs[0], in_place)
        elif inputs:
            return
        if not in_place:
            self._made.update(map(_memory, outputs))

    def _count_numbers(self, name: str, inputs: list[Tensor], output: Tensor) -> None:
        is_convolution = self._in_convolution()
        if name in BATCHED:
            kind = "convolution" if is_convolution else "attention"
            self.counts[kind] += output.numel() * inputs[-2].shape[-1]
        elif "scaled_dot_product" in name:
            products = 2 * inputs[0].numel() * inputs[1].shape[-2]
            shared = products - products // inputs[0].shape[-2]
            self.counts.update(attention=products, shared=shared)
        elif name in FOURIER:
            real = output if inputs[0].is_complex() else inputs[0]
            self.counts["fft"] += int(real.numel() * math.log2(max(2, real.shape[-1])))
        elif name not in COPIES | SCATTERS and any(self._is_moved(tensor) for tensor in inputs):
            kind = "convolution" if is_convolution else "recurrence"
            largest = max(inputs, key=Tensor.numel)
            self.counts[kind] += largest.numel() * (4 if largest.is_complex() else 1)

    def _count_bytes(self, name: str, inputs: list[Tensor], output: Tensor, in_place: bool) -> None:
        if name in SCATTERS:
            values = inputs[-1]
            self.counts["cache_read"] += _num_bytes(values) if self._is_moved(values) else 0
            self.counts["cache_written"] += _num_bytes(values) if self._is_moved(output) else 0
            return
        sources = inputs[1:] if name == "copy_" else inputs
        read = [tensor for tensor in sources if self._is_moved(tensor)]
        if name in COPIES:
            self.counts["cache_read"] += _num_bytes(output) if read else 0
        else:
            self.counts["cache_read"] += sum(map(_num_bytes, read))
        if name in BATCHED:
            self.counts["streams"] += sum(map(_num_runs, read))
            self.counts["stream_bytes"] += sum(map(_num_bytes, read))
        if self._is_moved(output) if in_place else _num_bytes(output) >= LARGE_BYTES:
            self.counts["cache_written"] += _num_bytes(output)

    def _is_moved(self, tensor: Tensor) -> bool:
        return _memory(tensor) not in self._made or _num_bytes(tensor) >= LARGE_BYTES


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_view(output: Tensor, inputs: list[Tensor]) -> bool:
    return _memory(output) in map(_memory, inputs)


def _num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, each counted once where it is expanded."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _num_runs(tensor: Tensor) -> int:
    """Return the number of stretches of contiguous memory that a tensor consists of."""
    run = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride == run:
            run *= size
    return tensor.numel() // run
