"""Names of the devices that decode."""

import os
import re

import torch

from stu.common.array_task import in_step_of_tasks
from stu.common.errors import UserError

ALLOWED = "auto, all, or a list of cpu, 0, cuda:0 and the like, separated by commas"


def choose_devices(text: str) -> list[str]:
    """Return torch's names of the devices in `text`: `auto`, `all`, `cpu`, `0` or `cuda:1,cpu`.

    `auto` is the first CUDA device, or the CPU without any; tasks of one SLURM step that see
    several devices take one each. Raises UserError for a device that does not exist.
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
        raise UserError("devices", text, ALLOWED)
    if int(match[1]) >= num_cuda:
        seen = f"only {num_cuda} CUDA devices" if num_cuda else "no CUDA device"
        raise UserError("devices", text, fix=f"torch sees {seen}; choose others, cpu, or auto")
    return f"cuda:{int(match[1])}"
