"""Allowances of requests and tokens a minute."""

import contextlib
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


def test_a_client_that_has_waited_may_use_twice_its_limit_in_a_minute_and_then_its_limit(clock):
    limits, counts = RateLimits(requests_per_minute=60, clock=clock), []
    for _ in range(2):
        for _ in range(3):
            counts.append(0)
            for _ in range(240):
                clock.now += 0.25
                with contextlib.suppress(RateLimited):
                    limits.charge("a", None, 1, {})
                    counts[-1] += 1
        clock.now += 600
    assert counts == 2 * [119, 60, 60]


def test_no_more_is_used_than_an_allowance_and_its_refill_however_requests_come(clock):
    """An hour of random traffic, at each of its moments."""
    rng, per_minute = random.Random(0), 100
    limits = RateLimits(tokens_per_minute=per_minute, clock=clock)
    began, used, pending, waits = clock.now, 0, [], []
    while clock.now < 4600:
        clock.now += rng.expovariate(2)
        while pending and rng.random() < 0.6:
            charge, tokens = pending.pop(rng.randrange(len(pending)))
            charge.settle(tokens)
            used += tokens
        asked = rng.randrange(1, 60)
        try:
            pending.append((limits.charge("a", None, asked, {}), rng.randrange(asked + 1)))
        except RateLimited as error:
            waits.append(error.seconds)
        running = sum(charge.num_tokens for charge, _ in pending)
        assert used + running <= per_minute * (1 + (clock.now - began) / 60) + 1e-6
    assert 0 < min(waits) < max(waits) <= 60
    assert used > 0.4 * 60 * per_minute


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
