"""Prefill takes nothing from the host while a chunk goes through the layers.

On CUDA that would be a copy for which the host waits, in each layer anew.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from serve.cache import attention_windows
from serve.cache.budget import make_caches
from serve.cache.window_blocks import on_device
from serve.config import EngineConfig
from serve.engine import runner as runner_module
from serve.engine.memory import PromptMemory
from serve.engine.runner import Chunk, Runner
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


@torch.inference_mode()
def test_prompts_go_to_the_device_without_waiting(monkeypatch):
    """All of a prefill, from token ids to the logits of those sequences that end, takes numbers
    from the host by the function for which it does not wait."""

    def unrecorded(numbers, device):
        with _disable_current_modes():
            return on_device(numbers, device)

    for module in (runner_module, attention_windows):
        monkeypatch.setattr(module, "on_device", unrecorded)
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "width": 16, "num_layers": 2, "num_heads": 2, "num_filters": 4}
    model = FlashSTU(ModelConfig(**shape, window_tokens=20, max_seq_len=200))
    config = EngineConfig(cache_gib=0.05, max_running=3, page_len=4)
    runner = Runner(model, make_caches(model, config), config)
    prompts = [torch.randint(50, (length,)).tolist() for length in (7, 30, 11)]
    rows = [runner.admit(len(prompt), 10) for prompt in prompts]
    ends = [True, False, True]
    chunks = [Chunk(*own) for own in zip(rows, prompts, [0, 0, 0], ends, strict=True)]
    with HostData() as host:
        (logits,) = runner.prefill(chunks)
    assert host.found == []
    expected = [model(torch.tensor([prompts[i]]))[0, -1] for i in (0, 2)]
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-5)
