"""The sampler's step: rows in any order, padding, masks, and nothing that a CUDA graph forbids."""

import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from serve.request import Request
from serve.sampling import selection
from serve.sampling.chooser import TokenChooser
from serve.sampling.features import EVERYTHING, FEW, GREEDY
from serve.sampling.sampler import DeviceSampler, uniforms
from serve.sampling.selection import at_least, largest, ordered, reached
from serve.sampling.tables import table_bytes
from serve.sampling_params import Constraint, SamplingParams
from tests.reference import sampling as reference
from tests.serve.sampling.test_sampling import VOCAB_SIZE, params, tokens

MAX_ROWS = 6
STOP_IDS = (3, 8)
NEVER_CAPTURED = {
    *("_local_scalar_dense", "item", "equal", "is_nonzero"),  # wait for the device
    *("nonzero", "masked_select", "unique", "resize"),  # shapes depend on values
    *("index", "index_put", "_index_put_impl", "_unsafe_index"),  # with a mask they do
    *("lift_fresh", "lift_fresh_copy"),  # new tensors from numbers of the host
}


class Capturable(TorchDispatchMode):
    """Fails on operations that a CUDA graph cannot hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name.rstrip("_") not in NEVER_CAPTURED, f"{name} cannot be captured"
        result = func(*args, **kwargs)
        sources = {arg.device for arg in args if isinstance(arg, torch.Tensor) and arg.dim()}
        if isinstance(result, torch.Tensor) and sources:
            assert {result.device} == sources, f"{name} copies between devices"
        return result


def as_on_a_device(is_device=True):
    """Let the sampler leave out tokens on a CPU as it does on a device."""
    name = "keep_first_on_device" if is_device else "keep_first_on_host"
    return mock.patch.object(selection, "keep_first_on_host", getattr(selection, name))


some_rows = st.lists(
    st.tuples(params, tokens, tokens, st.integers(0, 12)), min_size=1, max_size=MAX_ROWS
)


def make_sampler(rows, requests, vocab_size=VOCAB_SIZE, device="cpu"):
    """Give `rows` of a new sampler to these requests: settings, prompt, new tokens."""
    sampler = DeviceSampler(MAX_ROWS, vocab_size, device)
    for row, (own, prompt, new, *_) in zip(rows, requests, strict=True):
        sampler.set(row, Request(prompt, own), new, STOP_IDS)
    return sampler


def numbers(requests):
    return torch.tensor(
        [uniforms(own.seed, len(prompt + new)).item() for own, prompt, new, *_ in requests],
        dtype=torch.float64,
    )


def random_logits(num_rows, seed, distinct_values=None, vocab_size=VOCAB_SIZE):
    logits = torch.randn(num_rows, vocab_size, generator=torch.manual_seed(seed)) * 3
    return logits if distinct_values is None else (logits * distinct_values).round()


@given(some_rows, st.permutations(range(MAX_ROWS)), st.integers(0, 1000), st.booleans())
@settings(max_examples=100, deadline=None)
def test_several_steps_equal_the_reference(requests, order, seed, is_padded):
    """Rows in any order, with padding of NaN and more features than needed, count their tokens."""
    rows, num_padding = order[: len(requests)], 2 if is_padded else 0
    sampler = make_sampler(rows, requests)
    features = sampler.features(rows)
    if is_padded:
        features = EVERYTHING
        sampler.reserve(features)
    texts = [list(new) for _, _, new, _ in requests]
    for step in range(3):
        logits = random_logits(len(rows), seed + step, [None, 0.3][seed % 2]).double()
        now = [(own, prompt, text) for (own, prompt, *_), text in zip(requests, texts, strict=True)]
        padding = torch.full((num_padding, VOCAB_SIZE), math.nan)
        drawn = sampler.sample(
            torch.cat([logits, padding.double()]),
            torch.tensor([*rows, *[sampler.null_row] * num_padding]),
            torch.cat([numbers(now), torch.zeros(num_padding, dtype=torch.float64)]),
            features,
        ).tokens.tolist()
        for row, (own, prompt, text) in enumerate(now):
            position = len(prompt + text)
            expected = reference.sample(logits[row].tolist(), own, position, prompt, text)
            assert drawn[row] == expected
            text.append(expected)


@given(
    st.lists(
        st.tuples(
            st.builds(
                SamplingParams,
                temperature=st.sampled_from([0.0, 0.7, 3.0]),
                top_k=st.sampled_from([0, 1, 40, 64, 65, 199]),
                top_p=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
                seed=st.integers(0, 99),
            ),
            tokens,
            tokens,
        ),
        min_size=1,
        max_size=MAX_ROWS,
    ),
    st.integers(0, 1000),
    st.sampled_from([None, 0.3, 0.0]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_few_and_many_kept_tokens_equal_the_reference(
    requests, seed, distinct_values, dtype, is_device
):
    """A small top-k of all rows is searched in another way than one of some rows."""
    rows = range(len(requests))
    sampler = make_sampler(rows, requests, 200)
    logits = random_logits(len(rows), seed, distinct_values, 200).to(dtype)
    features = sampler.features(rows)
    with as_on_a_device(is_device):
        drawn = sampler.sample(logits, torch.tensor(rows), numbers(requests), features)
    for row, (own, prompt, new) in enumerate(requests):
        expected = reference.sample(logits[row].tolist(), own, len(prompt + new))
        assert drawn.tokens[row] == expected


ALL_PARAMS = [
    SamplingParams(),
    SamplingParams(0.7, top_k=3, top_p=0.9, logprobs=20),
    SamplingParams(1.0, min_p=0.1, repetition_penalty=1.3, logit_bias={2: 5.0}),
    SamplingParams(1.0, presence_penalty=1.0, frequency_penalty=0.5, min_new_tokens=9),
    SamplingParams(1.0, constraint=Constraint("regex", "a")),
]
ALL_ROWS = [4, 0, 2, 5, 1]


def sampler_of_everything(device="cpu", vocab_size=VOCAB_SIZE):
    requests = [(own, [1, 2], [3]) for own in ALL_PARAMS]
    sampler = make_sampler(ALL_ROWS, requests, vocab_size, device)
    words = np.full((1, math.ceil(vocab_size / 32)), -1, dtype=np.int32)
    words[0, 0] = ~7
    sampler.allow([1], words)
    sampler.reserve(EVERYTHING)
    return sampler


def step(sampler, features, logits):
    """Sample for all rows and two of padding, of which the logits are NaN."""
    device = logits.device
    places = torch.tensor([*ALL_ROWS, *[sampler.null_row] * 2], device=device)
    uniform = torch.full((len(places),), 0.4, dtype=torch.float64, device=device)
    logits = torch.cat([logits, torch.full_like(logits[:2], math.nan)])
    with Capturable(), as_on_a_device():
        return sampler.sample(logits, places, uniform, features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_step_can_be_captured(dtype):
    """It waits for nothing, copies nothing from the host, and its tables stay where they are."""
    sampler = sampler_of_everything()
    before = [tensor.data_ptr() for tensor in sampler.tables.tensors]
    for seed in range(50):
        sampled = step(sampler, EVERYTHING, random_logits(len(ALL_ROWS), seed).to(dtype))
    assert [tensor.data_ptr() for tensor in sampler.tables.tensors] == before
    assert sampled.logprobs.top_ids.shape == (len(ALL_ROWS) + 2, 20)


@pytest.mark.parametrize("features", [GREEDY, EVERYTHING, replace(EVERYTHING, most_kept=FEW)])
def test_step_leaves_its_device_alone(features):
    """Tensors without values fail where a step would read one, or mix devices."""
    sampler = DeviceSampler(MAX_ROWS, 200, "meta")
    sampler.reserve(features)
    sampled = step(sampler, features, torch.empty(len(ALL_ROWS), 200, device="meta"))
    assert sampled.tokens.is_meta


def test_more_features_change_no_token():
    logits = random_logits(len(ALL_ROWS), 8)
    together = step(sampler_of_everything(), EVERYTHING, logits)
    for place, row in enumerate(ALL_ROWS):
        sampler = sampler_of_everything()
        alone = step(sampler, sampler.features([row]), logits)
        assert alone.tokens[place] == together.tokens[place]


def test_stop_tokens_are_forbidden_until_there_are_enough():
    sampler = make_sampler([2], [(SamplingParams(min_new_tokens=3, max_new_tokens=9), [1], [5])])
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, STOP_IDS] = 9.0
    logits[0, 7] = 8.0
    drawn = [
        sampler.sample(logits, torch.tensor([2]), torch.zeros(1).double(), sampler.features([2]))
        for _ in range(3)
    ]
    assert [sampled.tokens.item() for sampled in drawn] == [7, 7, STOP_IDS[0]]


def test_nothing_is_forbidden_without_stop_tokens():
    own = SamplingParams(min_new_tokens=3, max_new_tokens=9)
    sampler = make_sampler([0], [(own, [1], [])])  # its mask is of this request
    sampler.clear(0)
    sampler.set(0, Request([1], own))
    sampler.set(1, Request([1], own), stop_ids=STOP_IDS)
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, STOP_IDS[0]], logits[:, 7] = 9.0, 8.0
    rows, uniform = torch.arange(2), torch.zeros(2, dtype=torch.float64)
    sampled = sampler.sample(logits, rows, uniform, sampler.features([0, 1]))
    assert sampled.tokens.tolist() == [STOP_IDS[0], 7]
    sampler.set(2, Request([1], own))  # its mask was never written
    rows = torch.tensor([2, 1])
    sampled = sampler.sample(logits, rows, uniform, sampler.features([1, 2]))
    assert sampled.is_allowed.tolist() == [True, True]


def test_flags_tell_rows_that_cannot_go_on():
    params = [SamplingParams(constraint=Constraint("regex", "a"))] * 2 + [SamplingParams(1.0)]
    sampler = make_sampler(range(3), [(own, [1], []) for own in params])
    words = np.zeros((2, math.ceil(VOCAB_SIZE / 32)), dtype=np.int32)
    words[0, 1] = 1 << 9  # 32 + 9
    sampler.allow([0, 1], words)
    logits = random_logits(3, 0)
    logits[2, 4] = math.inf
    rows, uniform = torch.arange(3), torch.zeros(3, dtype=torch.float64)
    sampled = sampler.sample(logits, rows, uniform, sampler.features(range(3)))
    assert sampled.tokens[0] == 41
    assert sampled.is_allowed.tolist()[:2] == [True, False]
    assert sampled.is_finite.tolist() == [True, True, False]
    assert sampled.tokens.min() >= 0
    assert sampled.tokens.max() < VOCAB_SIZE


def test_row_of_an_ended_request_leaves_nothing_to_the_next():
    greedy, logits = SamplingParams(), random_logits(2, 3)
    best = logits.argmax(-1)
    biased = SamplingParams(logit_bias={0: 100.0}, frequency_penalty=2.0, min_new_tokens=3)
    sampler = make_sampler([0, 1], [(biased, [1], [int(best[0])] * 9), (biased, [1], [])])
    everything = sampler.features([0, 1])
    sampler.clear(0)
    sampler.set(0, Request([1], greedy))
    uniform = torch.zeros(2, dtype=torch.float64)
    sampled = sampler.sample(logits, torch.tensor([0, 1]), uniform, everything)
    assert sampled.tokens.tolist() == [best[0], 0]


@pytest.mark.parametrize(("most_new_tokens", "bytes_of_count"), [(2**15 - 1, 2), (2**15, 4)])
def test_counts_take_as_few_bytes_as_they_need(most_new_tokens, bytes_of_count):
    sampler = DeviceSampler(2, 64, most_new_tokens=most_new_tokens)
    own = SamplingParams(frequency_penalty=1.0, max_new_tokens=most_new_tokens)
    new = [7] * (most_new_tokens - 1)
    sampler.set(1, Request([1], own), new)
    assert sampler.tables["new_counts"].nbytes == 3 * 64 * bytes_of_count
    sampler.reserve(EVERYTHING)
    tables = [sampler.tables[name] for name in EVERYTHING.tables]
    assert table_bytes(2, 64, most_new_tokens) == sum(table.nbytes for table in tables)
    logits = torch.zeros(1, 64)
    logits[0, 7] = most_new_tokens - 1 + 0.5  # half above all others, until it is chosen again
    rows, uniform = torch.tensor([1]), torch.zeros(1, dtype=torch.float64)
    features = sampler.features([1])
    drawn = [sampler.sample(logits, rows, uniform, features).tokens.item() for _ in range(2)]
    assert drawn == [7, 0]


def test_chooser_numbers_tokens_by_their_positions(code_tokenizer):
    """Whether it chose the tokens before, or another engine did."""
    chooser = TokenChooser(code_tokenizer, torch.device("cpu"))
    request = Request([1, 5, 6], SamplingParams(1.0, seed=3, max_new_tokens=99), new_token_ids=[4])
    chooser.add(0, request)
    begun = []
    for position in range(4, 90):
        if position == 50:  # a token that it did not choose
            chooser.append(0, 8)
            continue
        begun += [(position, *chooser.begin([0]))]
        chooser.append(0, 7)
    assert begun == [(position, reference.uniform(3, position)) for position, _ in begun]


def test_uniforms_are_those_of_their_positions():
    for seed, position in ((0, 0), (2**64 - 1, 5), (12345, 2**31)):
        expected = [reference.uniform(seed, position + i) for i in range(40)]
        assert uniforms(seed, position, 40).tolist() == expected


@given(
    st.integers(1, 40).flatmap(
        lambda size: st.lists(
            st.lists(
                st.one_of(
                    st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-45, 3e38]),
                    st.floats(width=32, allow_nan=False),
                ),
                min_size=size,
                max_size=size,
            ),
            min_size=1,
            max_size=4,
        )
    ),
    st.sampled_from([torch.float32, torch.float64]),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_selection_equals_sorting(values, dtype, data):
    numbers = torch.tensor(values, dtype=dtype)
    size = numbers.shape[1]
    count = data.draw(st.integers(1, size))
    keys = ordered(numbers)
    level = reached(
        keys, torch.ones_like(keys), torch.full((len(keys), 1), count), 8 * dtype.itemsize
    )
    kept = at_least(keys, level.key, count - level.above)
    for row, found, places in zip(numbers.tolist(), kept, largest(numbers, count), strict=True):
        expected = sorted(range(size), key=lambda i: (-row[i], i))[:count]
        assert places.tolist() == expected
        assert found.nonzero()[:, 0].tolist() == sorted(expected)


@given(
    st.integers(1, 70),
    st.lists(
        st.tuples(
            st.floats(0, 1.2),
            st.sampled_from(["weights", "ones"]),
            st.sampled_from([0.001, 1.0, 300.0]),
            st.sampled_from([None, 0.0, 0.3, 2.0]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_tokens_that_are_kept_equal_those_of_sorted_lists(size, shares, dtype, seed):
    """Also where many logits are equal, none is above 0, and a row is not finite."""
    num_rows, wanted = len(shares), []
    logits = random_logits(num_rows + 1, seed, None, size).to(dtype)
    weights = torch.empty(num_rows + 1, size, dtype=torch.float64)
    amounts, target = (
        torch.ones_like(weights, dtype=torch.int64),
        torch.ones(num_rows + 1, 1).long(),
    )
    logits[-1], weights[-1], amounts[-1] = math.nan, math.nan, -(2**63)
    for row, (share, kind, spread, distinct_values) in enumerate(shares):
        if distinct_values is not None:
            logits[row] = (logits[row] * distinct_values).round()
        logits[row] *= spread
        logits[row, seed % size] = -math.inf if size > 1 else 0.0
        weights[row] = (logits[row].double() - logits[row].max()).exp()
        if kind == "weights":
            amounts[row] = (weights[row] * 2.0**40).long()
        total = int(amounts[row].sum())
        target[row] = max(1, math.ceil(share * total))
        mass, kept = 0, [0.0] * size
        for token in sorted(range(size), key=lambda i: (-float(logits[row, i]), i)):
            if mass < target[row]:
                kept[token] = float(weights[row, token])
            mass += int(amounts[row, token])
        wanted.append(kept)
    for keep in selection.keep_first_on_host, selection.keep_first_on_device:
        found = weights.clone()
        keep(found, logits, amounts, target)
        assert found[:-1].tolist() == wanted
