"""What torch's profiler saw: how many operations a step calls, and within which others."""

from collections.abc import Callable, Iterator

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile


def operations(call: Callable[[], object]) -> int:
    """Those in which there is no other, views among them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    return sum(not its.cpu_children for its in profiled.events() or [])


def with_parents(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """It, and those that it is within, from the innermost out."""
    at: FunctionEvent | None = event
    while at is not None:
        yield at
        at = at.cpu_parent
