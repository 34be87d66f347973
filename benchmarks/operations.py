"""How many operations of torch a step calls."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def operations(call: Callable[[], object]) -> int:
    """Those in which there is no other, views among them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    return sum(not its.cpu_children for its in profiled.events() or [])
