"""Which devices decode."""

import os
import re

import torch

from stu.common.array_task import in_step_of_tasks

ALLOWED = "it must be auto, all, or some of cpu, 0, cuda:0 and the like, with commas between them"


def choose_devices(text: str) -> list[str]:
    """torch's names of the devices that `--devices` means: `auto`, `all`, `cpu`, `0`, `cuda:1,cpu`.

    auto: the first CUDA device, or cpu without any. Tasks of one SLURM step that see several
    devices take one each.

    Raises ValueError for a device that is not there.
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
    return [_device(name.strip(), text, num_cuda) for name in names]


def _device(name: str, text: str, num_cuda: int) -> str:
    if name == "cpu":
        return name
    match = re.fullmatch(r"(?:cuda:)?(\d+)", name)
    if not match:
        raise ValueError(f"devices={text!r} is not allowed: {ALLOWED}")
    if int(match[1]) >= num_cuda:
        seen = f"only {num_cuda} of them" if num_cuda else "no CUDA device"
        raise ValueError(f"devices={text!r}, and torch sees {seen}: choose others, cpu, or auto")
    return f"cuda:{int(match[1])}"
