"""Allowances of requests and tokens a minute."""

import random

import pytest

from serve.server.access.keys import Key
from serve.server.access.limits import RateLimited, RateLimits, duration
from stu.common.errors import UserError


class Clock:
    """A clock that tests move."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def key(**limits):
    return Key("own", b"", **limits)


def test_requests_refill_evenly(clock):
    limits, headers = RateLimits(requests_per_minute=3, clock=clock), {}
    for left in (2, 1, 0):
        limits.charge("a", None, 5, headers)
        assert headers["x-ratelimit-remaining-requests"] == str(left)
    assert headers["x-ratelimit-limit-requests"] == "3"
    assert headers["x-ratelimit-reset-requests"] == "1m0s"
    assert "x-ratelimit-limit-tokens" not in headers
    with pytest.raises(RateLimited, match="3 requests per minute") as error:
        limits.charge("a", None, 5, headers)
    assert error.value.headers == {"retry-after": "20", "retry-after-ms": "20000"}
    limits.charge("b", None, 5, headers)  # others have their own
    clock.now += error.value.seconds
    limits.charge("a", None, 5, headers)
    with pytest.raises(RateLimited):
        limits.charge("a", None, 5, headers)


def test_tokens_are_charged_in_advance_and_given_back(clock):
    limits, headers = RateLimits(tokens_per_minute=600, clock=clock), {}
    first = limits.charge("a", None, 400, headers)
    with pytest.raises(RateLimited) as error:
        limits.charge("a", None, 300, headers)
    assert error.value.seconds == pytest.approx(10)
    assert headers["x-ratelimit-remaining-tokens"] == "200"
    first.settle(150)
    limits.charge("a", None, 300, headers)
    assert headers["x-ratelimit-remaining-tokens"] == "150"
    assert headers["x-ratelimit-reset-tokens"] == "45s"
    with pytest.raises(UserError, match="601, more than the limit of 600 tokens per minute"):
        limits.charge("a", None, 601, headers)


def test_what_is_refused_is_charged_to_no_allowance(clock):
    limits, headers = RateLimits(2, 100, clock), {}
    limits.charge("a", None, 90, headers)
    for _ in range(5):
        with pytest.raises(RateLimited, match="tokens"):
            limits.charge("a", None, 50, headers)
    assert headers["x-ratelimit-remaining-requests"] == "1"
    limits.charge("a", None, 10, headers)


def test_a_key_has_its_own_limits_and_new_ones_apply_at_once(clock):
    limits, headers = RateLimits(1, 10, clock), {}
    limits.charge("own", key(requests_per_minute=10), 8, headers)
    assert headers["x-ratelimit-limit-requests"] == "10"
    assert headers["x-ratelimit-limit-tokens"] == "10"
    limits.charge("own", key(requests_per_minute=10, tokens_per_minute=1000), 2, headers)
    assert headers["x-ratelimit-limit-tokens"] == "1000"
    assert headers["x-ratelimit-remaining-tokens"] == "0"  # not full again
    limits = RateLimits(clock=clock)
    for _ in range(1000):
        limits.charge("own", key(), 10**9, headers := {})
    assert headers == {}


def test_no_minute_has_more_than_the_limit_however_requests_come(clock):
    """An hour of random traffic, against the sum of what was used in each minute."""
    rng, per_minute = random.Random(0), 100
    limits = RateLimits(tokens_per_minute=per_minute, clock=clock)
    used, pending, waits = [], [], []
    while clock.now < 4600:
        clock.now += rng.expovariate(2)
        while pending and rng.random() < 0.6:
            charge, tokens = pending.pop(rng.randrange(len(pending)))
            charge.settle(tokens)
            used.append((clock.now, tokens))
        asked = rng.randrange(1, 60)
        try:
            pending.append((limits.charge("a", None, asked, {}), rng.randrange(asked + 1)))
        except RateLimited as error:
            waits.append(error.seconds)
    assert 0 < min(waits) < max(waits) <= 60
    # What begins within a minute: a full allowance and its refill.
    for start, _ in used:
        within = sum(tokens for when, tokens in used if start <= when < start + 60)
        assert within <= 2 * per_minute + 60
    assert sum(tokens for _, tokens in used) > 0.4 * 60 * per_minute


def test_clients_with_full_allowances_are_forgotten(clock, monkeypatch):
    monkeypatch.setattr("serve.server.access.limits.MOST_FULL", 50)
    limits = RateLimits(requests_per_minute=60, clock=clock)
    for number in range(500):
        clock.now += 1
        limits.charge(f"address {number}", None, 1, {})
    assert len(limits._allowances) <= 50


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0ms"), (0.0171, "18ms"), (1, "1s"), (7.66, "7.66s"), (60, "1m0s"), (359.9, "5m59.9s")],
)
def test_durations_are_as_openai_writes_them(seconds, shown):
    assert duration(seconds) == shown
