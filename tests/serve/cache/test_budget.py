"""The memory that caches take on CUDA by default, by a stand-in for its allocator."""

import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from serve.cache import budget
from serve.config import EngineConfig
from serve.engine.inference_model import inference_copy
from serve.kernels.narrow_product import MOST_ROWS
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.convolution import causal_convolution
from stu.model import FlashSTU
from stu.model_dir import load_model, save_model
from stu.quantization import rounded_bytes
from stu.sequences.base import WHOLE

GIB = 2**30
SHAPE = {"width": 64, "num_layers": 2, "num_heads": 2, "num_filters": 8, "mlp_ratio": 2}
CONFIG = ModelConfig(vocab_size=50, max_seq_len=64, layout="stu", **SHAPE)


@pytest.fixture
def model_on_cuda(monkeypatch):
    """A model on a device with 10 GiB free, whose allocator keeps 5 GiB, of which 3 are used."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3 * GIB)
    monkeypatch.setattr(budget, "graph_bytes", lambda model, config: 2 * GIB)
    weight = SimpleNamespace(device=torch.device("cuda", 0))
    with torch.device("meta"):
        model = FlashSTU(CONFIG)
    names = "matrices", "named_parameters", "modules", "ranks", "num_ranks"
    parts = {name: getattr(model, name) for name in names}
    embedding = SimpleNamespace(weight=weight)
    return SimpleNamespace(embedding=embedding, config=CONFIG, weights="float", **parts)


@pytest.mark.parametrize(("enforce_eager", "free_gib"), [(False, 10), (True, 12)])
def test_default_size_counts_memory_that_torch_keeps(
    model_on_cuda, enforce_eager, free_gib, monkeypatch
):
    """Graphs take their part only where there are any."""
    config = EngineConfig(enforce_eager=enforce_eager)
    monkeypatch.setattr(budget, "other_bytes", lambda model, config: 0)
    assert budget._budget_bytes(model_on_cuda, config) == free_gib * GIB // 2


@pytest.mark.parametrize("weights", ["float", "int8", "fp8"])
def test_default_size_leaves_room_for_what_else_an_engine_takes(model_on_cuda, weights):
    """Tables of the sampler, and all matrices in 8 bits, in half of what is free."""
    model_on_cuda.config = replace(CONFIG, vocab_size=200_000)
    config = EngineConfig(enforce_eager=True, max_running=255, weights=weights)
    tables = 256 * 200_000 * (4 + 2 + 2 / 8)  # biases, counts, and two bits
    unembedding = 200_000 * (64 + 4) if weights != "float" else 0
    # The MLP has three matrices of 64 x 128, and the mixer one of 64 x 64.
    layer = 3 * 64 * 128 + 64**2 + 4 * (128 + 128 + 64 + 64)
    rounded = 2 * layer if weights != "float" else 0
    expected = (12 * GIB - tables - unembedding - rounded) / 2
    assert budget._budget_bytes(model_on_cuda, config) == expected


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_matrices_that_have_8_bits_already_take_no_more(code_tokenizer, tmp_path, stored):
    config = replace(CONFIG, vocab_size=code_tokenizer.vocab_size)
    save_model(tmp_path / "m", FlashSTU(config), code_tokenizer)
    wide, narrow = (load_model(tmp_path / "m", weights=own) for own in ("float", stored))
    other = "fp8" if stored == "int8" else "int8"
    whole = rounded_bytes(wide, wide.matrices, stored)
    assert rounded_bytes(narrow, narrow.matrices, stored) == 0
    assert rounded_bytes(narrow, narrow.matrices, other) == whole > 0


def test_graphs_have_room_for_a_copy_of_the_largest_matrix():
    """The unembedding of many tokens, if more rows than a kernel takes run at once."""
    counted = {}
    for vocab_size in (256, 1000):
        with torch.device("meta"):
            model = FlashSTU(replace(CONFIG, vocab_size=vocab_size))
        for weights in ("float", "int8"):
            config = EngineConfig(max_running=MOST_ROWS + 1, weights=weights)
            counted[vocab_size, weights] = budget.graph_bytes(model, config)
    copies = {size: counted[size, "int8"] - counted[size, "float"] for size in (256, 1000)}
    assert copies[1000] - copies[256] == (1000 - 256) * 64 * 4


class Largest(TorchDispatchMode):
    """Adds up the bytes of new tensors as large as all matrices of a layer."""

    def __init__(self, least):
        super().__init__()
        self.least, self.num_bytes = least, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.num_bytes += result.nbytes if result.numel() >= self.least else 0
        return result


@torch.inference_mode()
def test_no_step_copies_the_matrices_of_the_full_form():
    """They are arranged once, so graphs need no room for them; the model keeps its parameters."""
    model, taken = FlashSTU(replace(CONFIG, stu_form="full", num_filters=4)), []
    width, x = CONFIG.width, torch.randn(1, 1, CONFIG.width)
    before = [parameter.clone() for parameter in model.parameters()]
    expected = model.blocks[0].mixer(x, model.filters, WHOLE)
    for own in (model, inference_copy(model)):
        with Largest(2 * 4 * width**2) as largest:
            found = own.blocks[0].mixer(x, model.filters, WHOLE)
        taken.append(largest.num_bytes)
        torch.testing.assert_close(found, expected)
    assert taken[0] > taken[1] == 0
    assert all(map(torch.equal, before, model.parameters()))


def test_float64_decodes_in_pages_if_filters_are_rounded_to_float32(caplog):
    """Within 1e-8 of direct sums, which their states are not; the log says why."""
    torch.manual_seed(0)
    config = replace(CONFIG, num_layers=1, num_filters=24, max_seq_len=4096)
    settings = EngineConfig(cache_gib=0.05, max_running=1)
    assert budget.make_caches(FlashSTU(config), settings).convolution_info.kind == "state"
    model = FlashSTU(config).double()
    with caplog.at_level(logging.INFO):
        caches = budget.make_caches(model, settings)
    why = r"the taps of a channel .* or its outputs by \d\.\de-0\d, and float64 accepts 1e-08"
    assert re.search(rf"FutureFill in pages of .*, as {why}", caplog.text)
    with pytest.raises(UserError, match=f"convolution_cache=state is not possible .*{why}"):
        budget.make_caches(model, replace(settings, convolution_cache="state"))
    inputs = 1 + torch.randn(1, 1000, config.width, dtype=torch.float64)
    cache = caches.convolution
    cache.admit(0, 900, 100)
    cache.begin_chunk(0, 900)
    outputs = [cache.prefill(0, 0, inputs[:, :900])[0]]
    cache.join(0)
    for place in range(900, 1000):
        cache.begin_step([0], alone=False)
        outputs.append(cache.step(0, inputs[:, place]).clone())
        cache.advance()
    taps, lag_step = model.convolution_taps()
    expected = causal_convolution(inputs, taps[0], lag_step)[0]
    errors = (torch.cat(outputs) - expected).abs().amax(0) / expected.abs().amax(0)
    assert errors.max() <= 1e-8
