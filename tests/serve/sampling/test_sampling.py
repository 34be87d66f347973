"""Sampling against a plain reference, its distribution, and its independence of the batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.request import Request
from serve.sampling.sampler import DeviceSampler, token_logprobs, uniforms
from serve.sampling_params import SamplingParams
from stu.common.errors import UserError
from tests.reference import sampling as reference

VOCAB_SIZE = 50

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 7, VOCAB_SIZE, 10 * VOCAB_SIZE]),
    top_p=st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.7]),
    presence_penalty=st.sampled_from([0.0, 0.0, -2, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.5, 2]),
    logit_bias=st.dictionaries(
        st.integers(0, VOCAB_SIZE - 1), st.sampled_from([-100, -1.25, 3, 100]), max_size=2
    ),
    seed=st.integers(0, 2**64 - 1),
)
tokens = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=8)
rows = st.lists(st.tuples(params, st.integers(0, 2**31), tokens, tokens), min_size=1, max_size=6)


def random_logits(num_rows, seed, distinct_values=None):
    logits = torch.randn(num_rows, VOCAB_SIZE, generator=torch.manual_seed(seed)) * 3
    logits = logits if distinct_values is None else (logits * distinct_values).round()
    return logits.double()


def sample(logits, params, positions, prompts=None, texts=None, numbers=None):
    """Sample a token for each row of `logits`, whose request has these tokens so far."""
    sampler = DeviceSampler(len(logits), logits.shape[1])
    for row, own in enumerate(params):
        request = Request(prompts[row] if prompts else [0], own)
        sampler.set(row, request, texts[row] if texts else ())
    if numbers is None:
        seeds = (own.seed for own in params)
        pairs = zip(seeds, positions, strict=True)
        numbers = [uniforms(seed, position).item() for seed, position in pairs]
    numbers = torch.tensor(numbers, dtype=torch.float64)
    rows = range(len(logits))
    features = sampler.features(rows)
    return sampler.sample(logits, torch.tensor(rows), numbers, features).tokens


@given(rows, st.integers(0, 1000), st.sampled_from([None, 0.3, 0.0]))
@settings(max_examples=75, deadline=None)
def test_sampling_equals_the_reference(rows, logits_seed, distinct_values):
    """A small factor makes many ties, 0 makes all logits equal."""
    logits = random_logits(len(rows), logits_seed, distinct_values)
    before = logits.clone()
    all_params, positions, prompts, texts = zip(*rows, strict=True)
    ids = sample(logits, all_params, positions, prompts, texts)
    expected = [
        reference.sample(row.tolist(), *arguments)
        for row, *arguments in zip(logits, all_params, positions, prompts, texts, strict=True)
    ]
    assert ids.tolist() == expected
    assert torch.equal(logits, before)


@given(rows, st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_row_does_not_depend_on_its_batch(rows, logits_seed):
    logits = random_logits(len(rows), logits_seed).float()
    together = sample(logits, *zip(*rows, strict=True))
    for row, own in enumerate(rows):
        alone = sample(logits[row : row + 1], *([value] for value in own))
        assert alone.item() == together[row]


asked_rows = st.tuples(st.sampled_from([None, 0, 1, 3, 20]), st.integers(0, VOCAB_SIZE - 1))


@given(
    st.integers(1, 48).flatmap(lambda size: st.lists(asked_rows, min_size=size, max_size=size)),
    st.integers(0, 1000),
    st.sampled_from([None, 0.3, 0.0]),
    st.sampled_from([1, 3, VOCAB_SIZE]),
)
@settings(max_examples=50, deadline=None)
def test_logprobs_equal_the_reference(asked, logits_seed, distinct_values, vocab_size):
    """Of equal tokens the lower id comes first."""
    asked = [(count, token % vocab_size) for count, token in asked]
    logits = random_logits(len(asked), logits_seed, distinct_values)[:, :vocab_size]
    counts, tokens = zip(*asked, strict=True)
    results = token_logprobs(logits, tokens, counts)
    for row, (count, token), result in zip(logits.tolist(), asked, results, strict=True):
        if count is None:
            assert result is None
            continue
        logprob, top, rank = reference.logprobs(row, token, count)
        assert (result.token, result.rank) == (token, rank)
        assert result.logprob == pytest.approx(logprob, rel=1e-12)
        assert list(result.top) == list(top)
        assert result.top == pytest.approx(top, rel=1e-12)
        if token in result.top:  # to the last bit: clients compare them
            assert result.logprob == result.top[token]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1.0),
        pytest.param(SamplingParams(0.5, top_k=5), marks=pytest.mark.slow),
        SamplingParams(2.0, 8, 0.8),
    ],
)
def test_tokens_are_as_frequent_as_probable(params):
    num_draws = 4_000
    logits = random_logits(1, seed=4)[:, :12]
    draws = sample(logits.expand(num_draws, -1), [params] * num_draws, range(num_draws))
    counts = torch.bincount(draws, minlength=12).tolist()
    kept = params.temperature, params.top_k, params.top_p
    probabilities = reference.kept(logits[0].tolist(), *kept)
    assert len(probabilities) == {0: 12, 5: 5}.get(params.top_k, len(probabilities))
    for token, count in enumerate(counts):
        expected = num_draws * probabilities.get(token, 0.0)
        assert abs(count - expected) <= 4.5 * math.sqrt(expected)


def test_seeds_and_positions_give_different_draws():
    logits = torch.zeros(1000, VOCAB_SIZE)
    by_seed = sample(logits, [SamplingParams(1.0, seed=seed) for seed in range(1000)], [0] * 1000)
    by_position = sample(logits, [SamplingParams(1.0)] * 1000, range(1000))
    for ids in (by_seed, by_position):
        assert len(ids.unique()) == VOCAB_SIZE
        assert (ids[1:] == ids[:-1]).float().mean() < 3 / VOCAB_SIZE


def test_bfloat16_logits_are_summed_in_higher_precision():
    logits = torch.zeros(1, 4096, dtype=torch.bfloat16)  # bfloat16 cannot add 1/4096
    draws = sample(logits.expand(500, -1), [SamplingParams(1.0)] * 500, range(500))
    assert draws.max() > 3500
    assert len(draws.unique()) > 400


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_stay_finite(dtype, temperature):
    params = SamplingParams(temperature, repetition_penalty=0.01)
    logits = torch.full((1, VOCAB_SIZE), -1.0, dtype=dtype)
    logits[0, 3] = 3e38
    assert sample(logits, [params], [0], [[3]], [[5]]).item() == 3


def test_frequency_penalty_counts_new_tokens():
    params = SamplingParams(frequency_penalty=1.0)
    logits = torch.tensor([[0.0, 1.5, 1.0]])
    for new, expected in (([], 1), ([1], 2), ([1, 2], 1), ([1, 1, 2], 0)):
        assert sample(logits, [params], [0], [[0]], [new]).item() == expected


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
def test_impossible_tokens_are_never_drawn(uniform):
    logits = torch.full((2, VOCAB_SIZE), -math.inf)
    logits[:, [3, 7]] = 1.0
    params = [SamplingParams(5.0), SamplingParams(5.0, top_k=10)]
    draws = sample(logits, params, [0, 0], numbers=[uniform] * 2)
    assert set(draws.tolist()) <= {3, 7}


def test_unlikely_tokens_of_a_row_do_not_depend_on_other_rows():
    """The first of them is drawn at 0, though they add nothing to the sum of the weights."""
    logits = torch.full((2, 1001), -40.0)
    logits[:, 1000] = 0.0
    params = [SamplingParams(1.0), SamplingParams(1.0, top_p=0.5)]
    draws = sample(logits, params, [0, 0], numbers=[0.0, 0.0])
    assert draws.tolist() == [0, 1000]


NOT_ALLOWED = {
    "temperature": ("a finite number >= 0", [math.nan, -0.1, math.inf, "1", True]),
    "top_k": ("a whole number from 0", [-2, 2.0, 2**31]),
    "top_p": ("from 0 .* to 1", [-0.1, 1.01, math.nan, None]),
    "min_p": ("from 0", [-0.1, 1.5, math.nan]),
    "repetition_penalty": ("a number from 0.01 to 100", [1e-40, math.inf]),
    "presence_penalty": ("a number from -2 to 2", [2.1]),
    "frequency_penalty": ("a number from -2 to 2", [math.nan]),
    "logit_bias": (
        "a number from -100 to 100 for each",
        [{3: 101}, {3: math.nan}, {"3": 1}, {-3: 1}, [3]],
    ),
    "logprobs": ("from 0 to 20", [21, True, -1]),
    "seed": ("from 0 to", [-1, 2**64, 0.5]),
    "best_of": ("a whole number >= n", [0, True, "2"]),
    "skip_special_tokens": ("true or false", [None, 1]),
    "truncate_prompt_tokens": ("a whole number >= 1", [0, -1, True, 2.0]),
}


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [(name, value, allowed) for name, (allowed, values) in NOT_ALLOWED.items() for value in values],
)
def test_wrong_sampling_params_are_refused(name, value, allowed):
    with pytest.raises(UserError, match=f"{name}=.*is not allowed: it must be {allowed}"):
        SamplingParams(**{name: value})
