"""Capturing of CUDA graphs, on a stand-in for CUDA that records what it is asked for."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from serve.config import EngineConfig
from serve.engine import graphs
from serve.engine.decode_step import DecodeStep
from serve.engine.engine import Engine
from serve.engine.sampling_step import SamplingStep
from serve.sampling_params import SamplingParams
from stu.config import ModelConfig
from tests.models import float64_model
from tests.serve.requests import make_request

SHAPE = {"width": 16, "num_layers": 3, "num_heads": 2, "mlp_ratio": 2, "num_filters": 4}


class FakeStream:
    def __init__(self, events):
        self.events = events

    def wait_stream(self, other):
        self.events.append(("wait", self, other))


class FakeCuda:
    """Runs a captured function anew in each replay, as its kernels would."""

    def __init__(self):
        self.events, self.recording = [], None
        self.main, self.on = FakeStream(self.events), None
        cuda = self

        class CUDAGraph:
            def __init__(self):
                self.calls = []

            def replay(self):
                for call in self.calls:
                    call()

        self.CUDAGraph, self.Stream = CUDAGraph, lambda: FakeStream(cuda.events)

    def current_stream(self, device=None):
        return self.main

    def graph_pool_handle(self):
        return "pool"

    def mem_get_info(self, device):
        return 2**30, 2**31

    def synchronize(self):
        self.events.append(("synchronize",))

    @contextlib.contextmanager
    def device(self, device):
        yield

    @contextlib.contextmanager
    def stream(self, stream):
        self.on = stream
        yield
        self.on = None

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        self.recording, self.on = graph, stream
        yield
        self.recording = self.on = None


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=fake))
    return fake


def test_sizes_are_captured_largest_first_after_warming_up(cuda):
    runs = []

    def forward(batch):
        runs.append(("capture" if cuda.recording else "warm up", batch))
        assert cuda.on is not None, "all of it is on the capture's stream"
        if cuda.recording:
            cuda.recording.calls.append(lambda: runs.append(("replay", batch)))

    made = graphs.Graphs(torch.device("cpu"))
    made.capture({"forward": forward}, [1, 2, 8])
    expected = []
    for size in (8, 2, 1):
        expected += [("warm up", size)] * graphs.WARM_UPS + [("capture", size)]
    assert runs == expected
    waits = [event for event in cuda.events if event[0] == "wait"]
    side = made._stream
    assert waits == [("wait", side, cuda.main), ("wait", cuda.main, side)] * 3
    made.replay("forward", 2)
    assert runs[len(expected) :] == [("replay", 2)]


@pytest.mark.parametrize("kind", ["stu", "hybrid", "hyena", "attention"])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_an_engine_with_graphs_decodes_as_one_without(
    cuda, code_tokenizer, kind, batch_invariant, monkeypatch
):
    """Warming up changes nothing that a request sees."""
    torch.manual_seed(1)
    vocab_size = code_tokenizer.vocab_size
    config = ModelConfig(
        vocab_size=vocab_size, max_seq_len=128, window_tokens=10, layout=kind, **SHAPE
    )
    model = float64_model(config)
    random = [SamplingParams(), SamplingParams(1.0), SamplingParams(1.0, top_p=0.8, logprobs=1)]
    requests = [make_request([5 + i] * (1 + 4 * i), 20 + i, random[i % 3]) for i in range(5)]
    settings = {"cache_gib": 0.01, "page_len": 8, "max_running": 3, "overlap": True}
    results = []
    for captures in (False, True):
        engine = Engine(
            model,
            code_tokenizer,
            EngineConfig(**settings, batch_invariant=batch_invariant),
            static=True,
        )
        if captures:
            capture(engine, cuda, monkeypatch)
        found = {engine.add(request): [] for request in requests}
        while engine.has_work:
            for output in engine.step():
                found[output.request_id] += output.new_token_ids
            engine.check_integrity()
        results.append(found)
    assert results[0] == results[1]
    assert all(len(tokens) >= 20 for tokens in results[1].values())


def capture(engine, cuda, monkeypatch):
    """Make the engine's steps replay graphs."""
    methods = (DecodeStep, "_forward"), (DecodeStep, "_end_pages"), (SamplingStep, "_sample")
    for owner, name in methods:
        original = getattr(owner, name)

        def recorded(*args, original=original):
            if cuda.recording is not None:
                cuda.recording.calls.append(lambda: original(*args))
            else:
                original(*args)

        monkeypatch.setattr(owner, name, recorded)
    runner = engine._runner
    runner._static = runner._static_step(captures=True)
    runner.capture_sampling(engine._chooser.sampler)
    assert runner._static.graphs is not None
