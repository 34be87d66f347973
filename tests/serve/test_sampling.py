"""Sampling against a plain reference, its distribution, and its independence of the batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.sampling import SamplingParams, sample
from tests.reference import sampling as reference

VOCAB_SIZE = 50

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 7, VOCAB_SIZE, 10 * VOCAB_SIZE]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
rows = st.lists(st.tuples(params, st.integers(0, 2**31)), min_size=1, max_size=6)


def random_logits(num_rows, seed, distinct_values=None):
    logits = torch.randn(num_rows, VOCAB_SIZE, generator=torch.manual_seed(seed)) * 3
    return logits if distinct_values is None else (logits * distinct_values).round()


@given(rows, st.integers(0, 1000), st.sampled_from([None, 0.3, 0.0]))
@settings(max_examples=150, deadline=None)
def test_sampling_equals_the_reference(rows, logits_seed, distinct_values):
    """Few distinct logits make many ties; a factor of 0 makes all equal."""
    logits = random_logits(len(rows), logits_seed, distinct_values)
    ids = sample(logits, [its for its, _ in rows], [position for _, position in rows])
    expected = [
        reference.sample(row.tolist(), its, position)
        for row, (its, position) in zip(logits, rows, strict=True)
    ]
    assert ids.tolist() == expected


@given(rows, st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_a_row_does_not_depend_on_its_batch(rows, logits_seed):
    logits = random_logits(len(rows), logits_seed)
    together = sample(logits, [its for its, _ in rows], [position for _, position in rows])
    for row, (its, position) in enumerate(rows):
        assert sample(logits[row : row + 1], [its], [position]).item() == together[row]


@pytest.mark.parametrize(
    "its", [SamplingParams(1.0), SamplingParams(0.5, top_k=5), SamplingParams(2.0, 8, 0.8)]
)
def test_tokens_come_as_often_as_they_are_probable(its):
    num_draws = 20_000
    logits = random_logits(1, seed=4)[:, :12]
    draws = sample(logits.expand(num_draws, -1), [its] * num_draws, range(num_draws))
    counts = torch.bincount(draws, minlength=12).tolist()
    probabilities = reference.kept(logits[0].tolist(), its.temperature, its.top_k, its.top_p)
    assert len(probabilities) == {0: 12, 5: 5}.get(its.top_k, len(probabilities))
    for token, count in enumerate(counts):
        expected = num_draws * probabilities.get(token, 0.0)
        assert abs(count - expected) <= 4.5 * math.sqrt(expected)


def test_seeds_and_positions_draw_apart():
    logits = torch.zeros(1000, VOCAB_SIZE)
    by_seed = sample(logits, [SamplingParams(1.0, seed=seed) for seed in range(1000)], [0] * 1000)
    by_position = sample(logits, [SamplingParams(1.0)] * 1000, range(1000))
    for ids in (by_seed, by_position):
        assert len(ids.unique()) == VOCAB_SIZE
        assert (ids[1:] == ids[:-1]).float().mean() < 3 / VOCAB_SIZE


def test_bfloat16_logits_are_drawn_from_wider_sums():
    logits = torch.zeros(1, 4096, dtype=torch.bfloat16)  # 1/4096 of a bfloat16 sum is nothing
    draws = sample(logits.expand(500, -1), [SamplingParams(1.0)] * 500, range(500))
    assert draws.max() > 3500
    assert len(draws.unique()) > 400


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
def test_impossible_tokens_are_never_drawn(monkeypatch, uniform):
    monkeypatch.setattr("serve.sampling._uniform", lambda seed, position: uniform)
    logits = torch.full((2, VOCAB_SIZE), -math.inf)
    logits[:, [3, 7]] = 1.0
    draws = sample(logits, [SamplingParams(5.0), SamplingParams(5.0, top_k=10)], [0, 0])
    assert set(draws.tolist()) <= {3, 7}


def test_nothing_is_left_out_of_a_row_because_of_another_one(monkeypatch):
    """Not even a tail that adds nothing to the sum, once the sum has its largest term."""
    monkeypatch.setattr("serve.sampling._uniform", lambda seed, position: 0.0)
    logits = torch.full((2, 1001), -40.0)
    logits[:, 1000] = 0.0
    draws = sample(logits, [SamplingParams(1.0), SamplingParams(1.0, top_p=0.5)], [0, 0])
    assert draws.tolist() == [0, 1000]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite(bad):
    logits = random_logits(2, seed=0)
    logits[1, 5] = bad
    with pytest.raises(ValueError, match="logits are not finite"):
        sample(logits, [SamplingParams()] * 2, [0, 0])


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("temperature", math.nan, "a finite number >= 0"),
        ("temperature", -0.1, "a finite number >= 0"),
        ("temperature", math.inf, "a finite number >= 0"),
        ("temperature", "1", "a finite number >= 0"),
        ("temperature", True, "a finite number >= 0"),
        ("top_k", -1, "a whole number >= 0"),
        ("top_k", 2.0, "a whole number >= 0"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_p", math.nan, "above 0 and at most 1"),
        ("top_p", None, "above 0 and at most 1"),
        ("seed", -1, "from 0 to"),
        ("seed", 2**64, "from 0 to"),
        ("seed", 0.5, "from 0 to"),
    ],
)
def test_values_that_are_not_allowed(name, value, allowed):
    with pytest.raises(ValueError, match=f"{name}=.*is not allowed: it must be {allowed}"):
        SamplingParams(**{name: value})
