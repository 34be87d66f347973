"""Names of the devices that decode."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from serve.config import is_whole
from stu.common.array_task import in_step_of_tasks
from stu.common.errors import UserError, setting_name

ALLOWED = "auto, all, or a list of cpu, 0, cuda:0 and the like, separated by commas"


def choose_devices(text: str, field: str = "devices") -> list[str]:
    """Return torch's names of the devices in `text`: `auto`, `all`, `cpu`, `0` or `cuda:1,cpu`.

    `auto` is the first CUDA device, or the CPU without any; tasks of one SLURM step that see
    several devices take one each. Raises UserError, which names `field`, for a device that does not
    exist.
    """
    num_cuda = torch.cuda.device_count()
    if text == "auto" and num_cuda:
        local_task = os.environ["SLURM_LOCALID"] if in_step_of_tasks(os.environ) else 0
        return [f"cuda:{int(local_task) % num_cuda}"]
    if text == "auto":
        return ["cpu"]
    if text == "all" and num_cuda:
        return [f"cuda:{index}" for index in range(num_cuda)]
    names = ["cuda:0"] if text == "all" else text.split(",")
    return [_device(name.strip(), text, num_cuda, field) for name in names]


def device_groups(text: str, num_ranks: int, field: str = "devices") -> list[str]:
    """Return the devices of each engine, with commas between those of the ranks that divide its
    model.

    text: As for `choose_devices`, where `cpu` stands for all ranks of an engine and `auto` for the
    first CUDA devices. Raises UserError, which names `field`, for devices that do not make up
    groups of `num_ranks`.
    """
    if not is_whole(num_ranks) or num_ranks < 1:
        raise UserError("tensor_parallel", num_ranks, "a whole number >= 1")
    names, num_cuda = choose_devices(text, field), torch.cuda.device_count()
    if text == "auto" and names != ["cpu"] and num_ranks <= num_cuda:
        first = num_ranks * int(names[0].removeprefix("cuda:"))
        names = [f"cuda:{(first + rank) % num_cuda}" for rank in range(num_ranks)]
    names = [name for own in names for name in [own] * (num_ranks if own == "cpu" else 1)]
    groups = [names[first : first + num_ranks] for first in range(0, len(names), num_ranks)]
    for group in groups:
        is_cpu, is_cuda = set(group) == {"cpu"}, "cpu" not in group
        if len(group) < num_ranks or not (is_cpu or (is_cuda and len(set(group)) == num_ranks)):
            allowed = f"{num_ranks} different CUDA devices for each engine, or cpu"
            fix = f"{setting_name('tensor_parallel')}={num_ranks} divides a model among so many"
            raise UserError(field, text, allowed, fix)
    return [",".join(group) for group in groups]


def repeat_a_device(groups: Sequence[str]) -> bool:
    """Return whether several of these groups have a device in common."""
    names = [name for group in groups for name in set(group.split(","))]
    return len(set(names)) < len(names)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device has run out of memory; of a CPU, torch raises a mere RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def memory_checked() -> Iterator[None]:
    """Raise UserError, which names the settings to lower, where a device runs out of memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fields = map(setting_name, ("cache_gib", "max_running", "prompt_tokens_per_step"))
        message = f"out of memory: lower one of {', '.join(fields)}"
        raise UserError("cache_gib", message=message) from error


def _device(name: str, text: str, num_cuda: int, field: str) -> str:
    if name == "cpu":
        return name
    match = re.fullmatch(r"(?:cuda:)?(\d+)", "0" if name == "cuda" else name)
    if not match:
        raise UserError(field, text, ALLOWED)
    if int(match[1]) >= num_cuda:
        seen = f"only {num_cuda} CUDA devices" if num_cuda else "no CUDA device"
        raise UserError(field, text, fix=f"torch sees {seen}; choose others, cpu, or auto")
    return f"cuda:{int(match[1])}"
