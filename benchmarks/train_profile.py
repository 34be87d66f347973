"""Where the time of a training step goes, by torch's profiler."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from benchmarks.operations import with_parents
from stu import attention

STEP, ATTENTION, OPTIMIZER = "benchmark: step", "benchmark: attention", "benchmark: optimizer"
BACKWARD = "autograd::engine::evaluate_function: "
GROUPS = {
    "dense_products": "aten::mm outside loss and attention, forward and backward: MLPs and mixers",
    "convolution_fft": "rfft and irfft inside the convolution's forward and backward pass",
    "convolution_copies": "copies, transposing and padding, and fills there",
    "convolution_spectra": "products, conjugates and sums of spectra there",
    "attention": "scores, softmax, values and the windows' slices; not the qkv and output products",
    "loss": "the chunked loss, with its products",
    "optimizer": "clipping, AdamW, gradients set to None",
    "elementwise": "all other aten operations: norms, GELU, residuals, embedding, their gradients",
    "outside": "of any operation: Python, autograd, the profiler",
}
"""Each moment is counted once, for the innermost event of the profiler that it falls into."""


def profile(step: Callable[[], Any]) -> dict[str, Any]:
    """Seconds and shares of each group in one step, and their sum over a clock's time."""
    with (
        _marked_attention(),
        torch_profile(activities=[ProfilerActivity.CPU]) as profiler,
        record_function(STEP),
    ):
        began = time.perf_counter()
        step()
        by_clock = time.perf_counter() - began
    seconds = _seconds(profiler.events())
    total = sum(seconds.values())
    return {
        "seconds": seconds,
        "shares": {group: part / total for group, part in seconds.items()},
        "sum_over_clock": total / by_clock,
    }


@contextmanager
def _marked_attention() -> Iterator[None]:
    unmarked = attention.sliding_window_attention

    def marked(*arguments: Any) -> Tensor:
        with record_function(ATTENTION):
            return unmarked(*arguments)

    with patch.object(attention, "sliding_window_attention", marked):
        yield


def _seconds(events: list[FunctionEvent]) -> dict[str, float]:
    nodes = _attention_nodes(events)
    microseconds = Counter[str]()
    for event in events:
        microseconds[_group(event, nodes)] += event.self_cpu_time_total
    return {group: microseconds[group] / 1e6 for group in GROUPS}


def _group(event: FunctionEvent, attention: set[int]) -> str:
    for at in with_parents(event):
        if at.name in ("_CausalConvolution", "_CausalConvolutionBackward"):
            return _part_of_convolution(event)
        if at.name in ("_NextTokenLoss", "_NextTokenLossBackward"):
            return "loss"
        if at.name == OPTIMIZER:
            return "optimizer"
        if at.name == ATTENTION:
            return "attention"
        if at.name.startswith(BACKWARD) and at.sequence_nr in attention:
            return "attention"
    if any(at.name == "aten::mm" for at in with_parents(event)):
        return "dense_products"
    return "elementwise" if event.name.startswith("aten::") else "outside"


def _part_of_convolution(event: FunctionEvent) -> str:
    names = {at.name for at in with_parents(event)}
    if names & {"aten::fft_rfft", "aten::fft_irfft"}:
        return "convolution_fft"
    if names & {"aten::mul", "aten::mul_", "aten::sum", "aten::conj_physical_"}:
        return "convolution_spectra"
    return "convolution_copies" if event.name.startswith("aten::") else "outside"


def _attention_nodes(events: list[FunctionEvent]) -> set[int]:
    """Sequence numbers of autograd's nodes that were made inside attention."""
    made_inside: dict[int, bool] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr < 0 or any(at.name.startswith(BACKWARD) for at in with_parents(event)):
            continue
        # Operations that make no node bear the next one's number: the last to bear it made it.
        made_inside[event.sequence_nr] = any(at.name == ATTENTION for at in with_parents(event))
    return {number for number, inside in made_inside.items() if inside}
