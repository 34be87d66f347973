"""Steps of several tokens of a row, of which the first are kept, against steps of one token. What
is not kept is NaN, which shows if anything of it is left."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.cache.attention_windows import AttentionCache
from serve.cache.base import DraftedToken
from serve.cache.page_pool import PagePool
from serve.cache.recent_inputs import RecentInputs
from serve.cache.row_clocks import RowClocks
from stu.mixers import KeyWindow, LastInputs
from tests.serve.cache.test_cache import (
    LAYERS,
    decode,
    largest_error,
    prefill,
    random_inputs,
    setup,
    step,
)

KINDS = ["pages", "mixed", "alternating"]


def drafted(counts):
    """Return the tokens of rows, the earlier of each row first."""
    most = max(counts.values())
    return [DraftedToken(row, i) for i in range(most) for row in counts if i < counts[row]]


def step_drafts(made, inputs, kept):
    """Decode some tokens of each row and keep the first; return the outputs of these.

    inputs: By row, `[LAYERS, streams, T, C]`. kept: Numbers of tokens to keep, by row.
    """
    cache = made.cache
    tokens = drafted({row: own.shape[2] for row, own in inputs.items()})
    cache.begin_drafts(tokens, alone=False)
    outputs = {row: torch.empty_like(own) for row, own in inputs.items()}
    for layer in range(LAYERS):
        own = [inputs[row][layer, :, ahead] for row, ahead in tokens]
        split = len(own) // 2
        parts = [torch.cat(part) for part in (own[:split], own[split:]) if part]
        places = (0, split) if split else (0,)
        found = [cache.step(layer, *both) for both in zip(parts, places, strict=True)]
        for token, output in zip(tokens, torch.cat(found).split(made.streams), strict=True):
            outputs[token.row][layer, :, token.ahead] = output
    for row, count in kept.items():
        cache.keep(row, count)
    cache.advance_drafts()
    return {row: outputs[row][:, :, : kept[row]] for row in inputs}


def with_nan_after(inputs, count):
    damaged = inputs.clone()
    damaged[:, :, count:] = math.nan
    return damaged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_left_as_steps_of_one_token_leave_it(kind, dtype):
    """To the last bit: outputs and, except for wrong guesses that are yet to be overwritten, all
    that is remembered."""

    def made_and_inputs():
        torch.manual_seed(0)
        made = setup(kind, page_len=8, dtype=dtype)
        inputs = random_inputs(made, 110, dtype)
        made.cache.admit(1, 13, 100)
        prefill(made, 1, inputs[:, :, :13], [13])
        made.cache.join(1, 3)
        return made, inputs

    single, inputs = made_and_inputs()
    expected = decode(single, 1, inputs[:, :, 13:100])
    made, _ = made_and_inputs()
    outputs, place = [], 13
    generator = torch.Generator().manual_seed(1)
    while place < 100:
        if torch.rand((), generator=generator) < 0.2:
            outputs.append(step(made, [1], inputs[None, :, :, place])[0][:, :, None])
            place += 1
            continue
        most = min(100 - place, made.cache.most_tokens(1) or 12)
        count = int(torch.randint(1, most + 1, (), generator=generator))
        kept = int(torch.randint(1, count + 1, (), generator=generator))
        own = with_nan_after(inputs[:, :, place : place + count], kept)
        outputs.append(step_drafts(made, {1: own}, {1: kept})[1])
        place += kept
    assert torch.equal(torch.cat(outputs, 2), expected)
    names = [name for name in ("_states", "_pending", "_narrow") if hasattr(made.cache, name)]
    after = inputs[:, :, 100:]
    assert torch.equal(decode(made, 1, after), decode(single, 1, after))
    if kind != "pages":
        for name in [*names, "_inputs"]:
            assert torch.equal(getattr(made.cache, name)[1], getattr(single.cache, name)[1])
        copied = made.cache.snapshot(1, 110).tensors, single.cache.snapshot(1, 110).tensors
        assert torch.equal(copied[0][0], copied[1][0])


@given(
    kind=st.sampled_from(KINDS),
    page_len=st.sampled_from([2, 4, 16]),
    lag_step=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=5, deadline=None)
def test_rows_that_get_ahead_equal_their_direct_sums(kind, page_len, lag_step, seed):
    """Rows join one after the other, and take different numbers of tokens from then on."""
    torch.manual_seed(seed)
    made = setup(kind, page_len, lag_step)
    cache, prompts, length = made.cache, [5, 1, 8], 45
    inputs = [random_inputs(made, length) for _ in prompts]
    outputs, places = [torch.full(x.shape, math.nan) for x in inputs], {}
    for now in range(200):
        if now % 3 == 0 and now // 3 < len(prompts):
            row = now // 3
            prompt = prompts[row]
            cache.admit(row, prompt, length - prompt)
            whole = inputs[row][:, :, :prompt]
            outputs[row][:, :, :prompt] = prefill(made, row, whole, [prompt])
            cache.join(row)
            places[row] = prompt
        own, kept = {}, {}
        for row, place in places.items():
            most = min(6, length - place, cache.most_tokens(row) or 6)
            count = int(torch.randint(1, most + 1, ())) if now % 4 else 1
            kept[row] = int(torch.randint(1, count + 1, ()))
            part = inputs[row][:, :, place : place + count]
            own[row] = with_nan_after(part, kept[row])
        if now % 4 == 0:  # the usual step, of rows whose clocks differ
            tokens = torch.stack([own[row][:, :, 0] for row in places])
            found = step(made, list(places), tokens, split=True)
            found = {row: found[i, :, :, None] for i, row in enumerate(places)}
        else:
            found = step_drafts(made, own, kept)
        for row in list(places):
            outputs[row][:, :, places[row] : places[row] + kept[row]] = found[row]
            places[row] += kept[row]
            if places[row] == length:
                cache.leave(row)
                cache.release(row)
                del places[row]
        cache.check_integrity(list(places))
        if not places and now > 6:
            break
    assert cache.num_used == 0
    for own_inputs, own_outputs in zip(inputs, outputs, strict=True):
        assert largest_error(made, own_inputs, own_outputs) <= 2e-6


@pytest.mark.parametrize("page_len", [2, 4, 16])
def test_windows_are_left_as_steps_of_one_token_leave_them(page_len):
    """Pages as well; and a row never has more than it was promised."""
    window, most, length = KeyWindow(9, 2, 3, 50.0), 5, 70

    def made():
        pool = PagePool(60, (1, 2, page_len, 2, 3), torch.float64)
        pool.pages[1:] = math.nan
        cache = AttentionCache(window, pool, most - 1)
        for row, prompt in ((0, 7), (1, 12)):
            cache.admit(row, prompt, length - prompt)
            cache.begin_chunk(row, prompt)
            cache.prefill(row, 0, *inputs[row][:, None, :prompt])
        return cache

    torch.manual_seed(0)
    inputs = torch.randn(2, 3, length, 2, 3, dtype=torch.float64)
    single, expected = made(), {}
    for ahead in range(58):
        tokens = torch.stack([inputs[0, :, 7 + ahead], inputs[1, :, 12 + ahead]], 1)
        single.begin_step([0, 1], alone=True)
        for row, output in enumerate(single.step(0, *tokens[:, :, None])):
            expected[row, (7, 12)[row] + ahead] = output
        single.advance()
    cache, places = made(), {0: 7, 1: 12}
    while any(places[row] < (65, 70)[row] for row in places):
        counts = {row: int(torch.randint(1, most + 1, ())) for row in places}
        counts = {row: max(1, min(n, (65, 70)[row] - places[row])) for row, n in counts.items()}
        going = [row for row in places if places[row] < (65, 70)[row]]
        counts = {row: counts[row] for row in going}
        kept = {row: int(torch.randint(1, n + 1, ())) for row, n in counts.items()}
        if len(going) == 2 and torch.rand(()) < 0.4:  # the usual step
            cache.begin_step(going, alone=True)
            own = torch.stack([inputs[row, :, places[row]] for row in going], 1)
            for row, output in enumerate(cache.step(0, *own[:, :, None])):
                assert torch.equal(output, expected[row, places[row]])
                places[row] += 1
            cache.advance()
            continue
        tokens = drafted(counts)
        cache.begin_drafts(tokens, alone=True)
        own = torch.stack([inputs[row, :, places[row] + ahead] for row, ahead in tokens], 1)
        wrong = torch.tensor([ahead >= kept[row] for row, ahead in tokens])
        own[:, wrong] = math.nan
        found = cache.step(0, *own[:, :, None])
        for (row, ahead), output in zip(tokens, found, strict=True):
            if ahead < kept[row]:
                assert torch.equal(output, expected[row, places[row] + ahead])
        for row in counts:
            cache.keep(row, kept[row])
            places[row] += kept[row]
        cache.advance_drafts()
        cache.check_integrity([0, 1])
    for row in (0, 1):
        one, other = cache._windows[row], single._windows[row]
        assert one.length == other.length
        assert one.pages
    copies = [own.snapshot(1, 70).tensors for own in (cache, single)]
    assert all(copy.isfinite().all() for copy in copies[0])


def test_last_inputs_are_left_as_steps_of_one_token_leave_them():
    torch.manual_seed(0)
    taps = torch.randn(4, 3, dtype=torch.float64)
    single, cache = (RecentInputs([LastInputs(3, 4)], 3, torch.float64) for _ in range(2))
    inputs = torch.randn(40, 1, 3, dtype=torch.float64)
    for own in (single, cache):
        own.admit(2, 0, 40)
    expected = []
    for x in inputs:
        single.begin_step([2], alone=False)
        expected.append(single.step(0, x[None], taps)[0])
    place = 0
    while place < 40:
        count = min(40 - place, int(torch.randint(1, 7, ())))
        kept = int(torch.randint(1, count + 1, ()))
        own = inputs[place : place + count].clone()
        own[kept:] = math.nan
        cache.begin_drafts(drafted({2: count}), alone=False)
        found = cache.step(0, own, taps)
        assert torch.equal(found[:kept], torch.stack(expected[place : place + kept]))
        cache.keep(2, kept)
        cache.advance_drafts()
        place += kept
    assert torch.equal(cache._inputs[0][2], single._inputs[0][2])


def test_runs_are_of_rows_whose_clocks_agree():
    clocks = RowClocks(9)
    clocks.move(2, 3)
    clocks.move(5, 3)
    clocks.move(6, 1)
    assert [tuple(run) for run in clocks.runs([1, 2, 4, 5, 6])] == [
        (slice(0, 1), slice(1, 2), 0),
        (slice(1, 2), slice(2, 3), 3),
        (slice(2, 3), slice(4, 5), 0),
        (slice(3, 4), slice(5, 6), 3),
        (slice(4, 5), slice(6, 7), 1),
    ]
    clocks.align([2, 5, 6])
    assert [clocks.of(row) for row in (2, 5, 6)] == [3, 3, 1]
    assert (clocks.time, clocks.ahead(6), clocks.ahead(5)) == (1, 0, 2)
    assert clocks.runs([5, 6])[1] == (slice(1, 2), slice(6, 7), 0)
