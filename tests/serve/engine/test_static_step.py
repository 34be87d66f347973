"""Steps over tensors that stay where they are, against the engine's usual steps on the CPU."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from serve.cache.page_pool import NULL_PAGE
from serve.config import EngineConfig
from serve.engine import decode_step, step_state
from serve.engine.decode_step import batch_sizes
from serve.engine.engine import Engine
from serve.engine.sampling_step import KINDS as KINDS_OF_SAMPLING
from serve.engine.step_state import NUM_BUFFERS, StepState
from serve.kernels.norm import add_norm
from serve.sampling import selection
from serve.sampling_params import SamplingParams
from stu.config import ModelConfig
from stu.tokenizers.sentence_piece import train_bpe
from tests.models import float64_model
from tests.serve.requests import make_request

VOCAB_SIZE = 280
KINDS = {
    "stu": {"layout": "stu"},
    "hybrid": {"layout": "hybrid", "window_tokens": 10},
    "full": {"layout": "stu", "stu_form": "full", "num_filters": 2, "num_layers": 2},
    "hyena": {"layout": "hyena"},
    "attention": {"layout": "attention", "window_tokens": 10},
}
CACHES = [*((kind, None) for kind in KINDS), ("stu", "pages"), ("full", "pages")]
TRAFFIC = [(*cache, *step) for cache in CACHES for step in itertools.product((2, 8), (False, True))]
QUICK = [
    *((*cache, 2, False) for cache in (("hybrid", None), ("stu", "pages"))),
    ("full", None, 8, False),
    *((*cache, 8, True) for cache in (("hybrid", None), ("hyena", None), ("full", "pages"))),
]
"""Every kind of cache in a few steps: the layers of `hybrid` are those of `stu` and `attention`."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = ["the cat sat on the mat\n", "a dog and a cat\n"] * 5
    return train_bpe(texts, VOCAB_SIZE, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def models():
    return {kind: build(kind) for kind in KINDS}


@pytest.fixture
def make_engine(tokenizer, models):
    def make(kind, static=True, **settings):
        values = {"cache_gib": 0.01, "page_len": 8, "max_running": 5, **settings}
        return Engine(models[kind], tokenizer, EngineConfig(**values), static)

    return make


def build(kind):
    torch.manual_seed(1)
    shape = {"width": 16, "num_layers": 3, "num_heads": 2, "mlp_ratio": 2, "num_filters": 4}
    config = ModelConfig(**{**shape, **KINDS[kind]}, vocab_size=VOCAB_SIZE, max_seq_len=256)
    return float64_model(config)


class Traffic:
    """Requests that come, go and are aborted or preempted at random, the same for each seed."""

    def __init__(self, engine, seed, rate=0.3):
        self.engine, self.random = engine, torch.Generator().manual_seed(seed)
        self.rate, self.outputs, self.ids = rate, [], []

    def step(self):
        if torch.rand((), generator=self.random) < self.rate:
            length, count = self.number(1, 40), self.number(1, 30)
            prompt = torch.randint(0, VOCAB_SIZE, (length,), generator=self.random).tolist()
            sampling = SamplingParams(
                temperature=self.number(0, 2),
                top_k=[0, 5, 70][self.number(0, 3)],
                top_p=[1.0, 0.8][self.number(0, 2)],
                seed=length,
            )
            stops = [self.number(0, VOCAB_SIZE)]
            request = make_request(
                prompt, count, sampling, priority=self.number(0, 2), stop_token_ids=stops
            )
            self.ids.append(self.engine.add(request))
        if self.ids and torch.rand((), generator=self.random) < self.rate / 10:
            self.engine.abort(self.ids[self.number(0, len(self.ids))])
        self.outputs += self.engine.step()
        self.engine.check_integrity()

    def number(self, least, stop):
        return int(torch.randint(least, stop, (), generator=self.random))


def record_logits(engine):
    """Return a list to which the logits of each step are appended."""
    decode, recorded = engine._runner.decode, []

    def decode_and_record(tokens):
        logits = decode(tokens)
        recorded.append(logits.clone())
        return logits

    engine._runner.decode = decode_and_record
    return recorded


def spread_nan(engine):
    """Write NaN to all that belongs to no sequence: null rows, free rows, null pages, free
    pages."""
    caches, rows = engine._caches, sorted(engine._runner._rows)
    for cache in caches.all:
        if cache.pool is not None:
            free = [NULL_PAGE, *cache.pool._free]
            cache.pool.pages[free] = math.nan
    convolution = caches.convolution
    if convolution is not None:
        by_row = {"_states": 0, "_inputs": 0, "_pending": 0, "_narrow": 0}
        if convolution.pool is not None:
            by_row = {"_inputs": 2, "_pending": 3}
        for name, dim in by_row.items():
            tensor = getattr(convolution, name, None)
            if tensor is not None:
                free = [row for row in range(tensor.shape[dim]) if row not in rows]
                tensor.movedim(dim, 0)[free] = math.nan
    for inputs in caches.recent._inputs if caches.recent else ():
        inputs[[row for row in range(len(inputs)) if row not in rows]] = math.nan


@pytest.mark.parametrize(
    ("kind", "cache", "page_len", "batch_invariant", "num_steps"),
    [
        *((*case, 100) for case in QUICK),
        *(pytest.param(*case, 150, marks=pytest.mark.slow) for case in TRAFFIC),
    ],
)
def test_logits_equal_those_of_the_usual_steps(
    make_engine, kind, cache, page_len, batch_invariant, num_steps
):
    """In random traffic, with preemptions, and with NaN wherever nothing may be read."""
    settings = {
        "page_len": page_len,
        "convolution_cache": cache,
        "batch_invariant": batch_invariant,
        "max_running": 3,
    }
    if cache == "pages" and not batch_invariant:
        settings["expected_new_tokens"] = 20
    recorded, outputs = [], []
    for static in (False, True):
        engine = make_engine(kind, static, **settings)
        recorded.append(record_logits(engine))
        traffic = Traffic(engine, seed=page_len)
        for _ in range(num_steps):
            traffic.step()
            if static:
                spread_nan(engine)
        outputs.append(traffic.outputs)
        assert engine.stats().preemptions > 0
    assert len(recorded[0]) == len(recorded[1]) > num_steps / 2
    for usual, found in zip(*recorded, strict=True):
        assert (found - usual).abs().max() <= 1e-12 * usual.abs().max()
    assert outputs[0] == outputs[1]


def test_every_sum_of_the_stream_runs_with_the_norm_after_it(make_engine, monkeypatch):
    added = []

    def counted(stream, own, weight, eps):
        added.append(own is not None)
        return add_norm(stream, own, weight, eps)

    monkeypatch.setattr(decode_step, "add_norm", counted)
    engine = make_engine("hybrid")
    engine.add(make_request([5, 6], 3))
    for _ in range(2):
        engine.step()
    assert added == [False] + [True] * (2 * 3), (
        "two for each of three layers, the last one at the end"
    )


class NoNumbers(TorchFunctionMode):
    """Fails where the host asks for numbers of a tensor or gives its own. In inference mode, a
    dispatch mode sees neither."""

    FORBIDDEN = (
        *("item", "tolist", "numpy", "cpu", "tensor"),
        *("__int__", "__float__", "__bool__", "__index__"),
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func.__name__ not in self.FORBIDDEN, func.__name__
        return func(*args, **(kwargs or {}))


class NoSync(TorchDispatchMode):
    """Fails where a GPU would make the host wait, or where the host gives numbers of its own."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "lift_fresh",
        "scalar_tensor",
        "is_nonzero",
        "equal.default",
        "_unique",
        "resize",
    )

    def __init__(self):
        super().__init__()
        self.count, self._functions = 0, NoNumbers()

    def __enter__(self):
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(func)
        self.count += 1
        assert not any(word in name for word in self.FORBIDDEN), name
        if "_to_copy" in name:
            assert kwargs.get("device") in (None, args[0].device), f"{name} to another device"
        if name.startswith("aten.index"):
            indices = args[1] if isinstance(args[1], list | tuple) else args[2:3]
            for index in indices:
                assert getattr(index, "dtype", None) is not torch.bool, f"{name} by a mask"
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "cache", "batch_invariant", "num_steps"),
    [
        ("hybrid", None, False, 120),
        ("hyena", None, True, 120),
        *(pytest.param(*cache, False, 200, marks=pytest.mark.slow) for cache in CACHES),
        pytest.param("hybrid", None, True, 200, marks=pytest.mark.slow),
        pytest.param("hybrid", None, False, 1000, marks=pytest.mark.slow),
        pytest.param("hyena", None, False, 1000, marks=pytest.mark.slow),
    ],
)
def test_the_device_part_never_waits_and_keeps_its_addresses(
    make_engine, monkeypatch, kind, cache, batch_invariant, num_steps
):
    """Over many random steps, whatever the size of the batch, and of the sampler."""
    monkeypatch.setattr(selection, "keep_first_on_host", selection.keep_first_on_device)
    settings = {"convolution_cache": cache, "batch_invariant": batch_invariant, "overlap": True}
    engine = make_engine(kind, **settings)
    step, sampling = engine._runner._static, engine._runner._sampling
    expected, mode, runs, sampled = static_addresses(engine), NoSync(), [], []

    def run(name, batch):
        runs.append((name, batch))
        with mode:
            getattr(step, f"_{name}")(batch)
        assert static_addresses(engine) == expected

    def sample(name, batch):
        sampled.append(name)
        with mode:
            sampling._functions[name](batch)
        assert static_addresses(engine) == expected

    step._run, sampling._run = run, sample
    traffic = Traffic(engine, seed=5, rate=0.15)
    while engine.stats().steps < num_steps:
        traffic.step()
    names, batches = zip(*runs, strict=True)
    has_states = cache is None and kind in ("stu", "hybrid", "full")
    assert set(names) == ({"forward", "end_pages"} if has_states else {"forward"})
    assert names.count("forward") > num_steps / 2
    assert len(set(batches)) >= (1 if batch_invariant else 3)
    assert set(sampled) == set(KINDS_OF_SAMPLING), "each kind of captured sampling"
    assert len(sampled) > num_steps / 3


def static_addresses(engine):
    """Return the addresses of all tensors that a step reads and writes, besides its temporaries."""
    step = engine._runner._static
    sampling = engine._runner._sampling
    found = [step._last_tokens, step.logits, sampling._tokens, sampling._flags]
    for state in step._state, sampling._state:
        found += [state._numbers, *state._buffers]
    found += sampling._sampler.tables.tensors
    for cache in engine._caches.all:
        tensors = [vars(cache).get(name) for name in ("_states", "_inputs", "_pending", "_narrow")]
        found += [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
        found += [cache.pool.pages] if cache.pool is not None else []
    found += engine._caches.recent._inputs if engine._caches.recent else []
    found += itertools.chain(engine._runner._model.parameters(), engine._runner._model.buffers())
    return [tensor.data_ptr() for tensor in found if tensor.layout is torch.strided]


@pytest.mark.parametrize("inference", [False, True])
def test_a_step_that_waits_is_found(inference):
    numbers = np.ones(3, np.float32)
    for wait in (
        lambda x: x[0].item(),
        lambda x: int(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x + torch.tensor([1.0]),
        lambda x: x + torch.as_tensor([1.0]),
        lambda x: x + torch.asarray([1.0]),
        lambda x: x + torch.from_numpy(numbers),
        *([] if inference else [lambda x: x.to("meta")]),
    ):
        with pytest.raises(AssertionError), torch.inference_mode(inference), NoSync():
            wait(torch.ones(3))


@pytest.mark.parametrize(
    ("num_rows", "batch_invariant", "expected"),
    [
        (1, False, [1]),
        (3, False, [1, 2, 4]),
        (8, False, [1, 2, 4, 8]),
        (17, False, [1, 2, 4, 8, 16, 24]),
        (16, True, [8, 16]),
    ],
)
def test_batch_sizes(num_rows, batch_invariant, expected):
    assert batch_sizes(num_rows, batch_invariant) == expected


class DelayedDevice:
    """A device whose copies run as late as it is allowed: when someone waits for one of them."""

    def __init__(self):
        self.waiting, self.seen = [], []

    def copy(self, target, source):
        copy = DelayedCopy(self, target, source)
        self.waiting.append(copy)
        return copy


class DelayedCopy:
    def __init__(self, device, target, source):
        self.device, self.target, self.source = device, target, source

    def synchronize(self):
        waiting = self.device.waiting
        while self in waiting:
            copy = waiting.pop(0)
            copy.target.copy_(copy.source)
            self.device.seen.append(copy.target.clone())


class NumbersOnly:
    """Stands for a cache's static step."""

    num_shared, num_own = 2, 3


def copied_numbers(steps):
    """Send random numbers; return them as they were sent, and as a slow device copies them."""
    device, source = DelayedDevice(), torch.Generator().manual_seed(0)
    state = StepState([NumbersOnly(), NumbersOnly()], 7, torch.device("cpu"), device.copy)
    sent = []
    for _ in range(steps):
        batch = int(torch.randint(1, 8, (), generator=source))
        numbers = state.fill()
        for shared, own in numbers.by_cache:
            shared[:] = torch.randint(0, 1000, shared.shape, generator=source).numpy()
            own[:] = torch.randint(0, 1000, own.shape, generator=source).numpy()
        numbers.rows[:, :2] = torch.randint(0, 1000, (7, 2), generator=source).numpy()
        whole = torch.cat(
            [torch.from_numpy(shared.copy()) for shared, _ in numbers.by_cache]
            + [torch.from_numpy(numbers.rows[:batch].copy()).flatten()]
        )
        sent.append(whole)
        state.send(batch)
    device.waiting[-1].synchronize()
    return sent, device.seen


def test_pinned_buffers_are_not_filled_before_they_are_copied():
    sent, seen = copied_numbers(50)
    assert len(seen) == 50
    assert all(map(torch.equal, sent, seen))


def test_buffer_that_is_filled_too_early_is_found(monkeypatch):
    original = step_state.StepState.fill

    def fill_at_once(self):
        self._copied = [step_state._Reached()] * NUM_BUFFERS
        return original(self)

    monkeypatch.setattr(step_state.StepState, "fill", fill_at_once)
    sent, seen = copied_numbers(50)
    assert len(seen) == 50
    assert not all(map(torch.equal, sent, seen))
