"""Prefill takes nothing from the host while a chunk goes through the layers.

On CUDA that would be a copy for which the host waits, in each layer anew.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from serve.cache.budget import make_caches
from serve.config import EngineConfig
from serve.engine.memory import PromptMemory
from stu.config import ModelConfig
from stu.model import FlashSTU

WAITING = {"lift_fresh", "_local_scalar_dense", "nonzero", "_to_copy.device"}


class HostData(TorchDispatchMode):
    """Records operations that make a tensor of numbers in Python, or read one."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in WAITING:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "kind",
    [
        {"layout": "stu"},
        {"layout": "stu", "stu_form": "full"},
        {"layout": "hybrid"},
        {"layout": "attention"},
    ],
)
@torch.inference_mode()
def test_layers_take_nothing_from_the_host(kind):
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "width": 16, "num_layers": 4, "num_heads": 2, "num_filters": 4}
    config = ModelConfig(**shape, window_tokens=20, max_seq_len=200, **kind)
    model = FlashSTU(config)
    tokens = torch.randint(50, (1, 100))
    expected = model.hidden(tokens)
    caches = make_caches(model, EngineConfig(cache_gib=0.05, max_running=2, page_len=4))
    for cache in caches.all:
        cache.admit(0, 100, 10)
    found, start = [], 0
    for length in (30, 1, 45, 24):
        for cache in caches.all:
            cache.begin_chunk(0, length)
        memory = PromptMemory(caches, [0], [length])
        with HostData() as host:
            found.append(model.hidden(tokens[:, start : start + length], memory))
        assert host.found == []
        start += length
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)
