"""Prefixes that engines remember."""

from dataclasses import replace

import pytest
import torch

from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.sampling_params import SamplingParams
from stu.common.errors import UserError
from stu.model import FlashSTU
from tests.models import float64_model
from tests.serve.requests import make_request

SYSTEM = [(11 * place + place // 5) % 90 + 3 for place in range(100)]
LAYOUTS = ["attention", "hybrid", "stu"]


@pytest.fixture(scope="module")
def make_engine(code_model, code_tokenizer):
    """Return a function of a layout, and settings."""

    def make(layout="hybrid", dtype=torch.float64, **settings):
        torch.manual_seed(0)
        config = replace(code_model.config, layout=layout, max_seq_len=512, window_tokens=40)
        is_wide = dtype == torch.float64
        model = float64_model(config) if is_wide else FlashSTU(config).to(dtype).eval()
        settings = {"cache_gib": 0.05, "page_len": 16, **settings}
        return Engine(model, code_tokenizer, EngineConfig(**settings))

    return make


def run(engine, *requests):
    """Decode requests that arrive together; return the tokens of each and its cached tokens."""
    found = {engine.add(request): ([], 0) for request in requests}
    while engine.has_work:
        for output in engine.step():
            tokens, _ = found[output.request_id]
            found[output.request_id] = [*tokens, *output.new_token_ids], output.cached_tokens
        engine.check_integrity()
    return list(found.values())


def ask(prompt, new_tokens=20, **values):
    return make_request(prompt, new_tokens, SamplingParams(temperature=1.0), **values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_turn_of_a_chat_computes_only_what_is_new(make_engine, layout):
    engine, alone = make_engine(layout), make_engine(layout, prefix_cache_gib=0)
    history, seen = list(SYSTEM), 0
    for turn in range(4):
        history += [turn + 40] * 7
        ((answer, cached),) = run(engine, ask(history))
        assert cached == seen
        assert answer == run(alone, ask(history))[0][0]
        history += answer
        seen = len(history) - 1  # the last token of an answer goes through the model no more
    assert engine.stats().prompt_tokens == 4 * 7 + 3 + len(SYSTEM)
    assert engine.stats().prefix_tokens_found == alone.stats().prompt_tokens - 131
    assert alone.stats().prefix_tokens_asked == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_waiting_requests_compute_a_common_prefix_once(make_engine, layout):
    engine = make_engine(layout, max_running=4)
    prompts = [[*SYSTEM, *[50 + number] * 5] for number in range(6)]
    requests = [ask(prompt, 30) for prompt in [*prompts, prompts[0]]]
    found = run(engine, *requests)
    assert [cached for _, cached in found] == [0, *[96] * 6]
    assert engine.stats().prompt_tokens == 105 + 6 * 9
    alone = make_engine(layout, prefix_cache_gib=0)
    assert [tokens for tokens, _ in found] == [run(alone, own)[0][0] for own in requests]


def test_a_prompt_with_a_branch_seen_before_leaves_a_snapshot_there(make_engine):
    """The second request with a system prompt shows where it ends, and the third finds it."""
    engine = make_engine()
    owns = (50, 51, 52, 52, 52)
    cached = [run(engine, ask([*SYSTEM[:70], *[own] * 30]))[0][1] for own in owns]
    assert cached == [0, 0, 64, 64, 96]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [300, 289, 257])
def test_a_long_prompt_that_comes_again_is_found(make_engine, layout, length):
    """An answer to it is generated again, for example."""
    prompt, engine = (SYSTEM * 3)[:length], make_engine(layout)
    first, second = (run(engine, ask(prompt, 4))[0] for _ in range(2))
    assert (first[1], second[1]) == (0, (length - 1) // 32 * 32)
    assert first[0] == second[0]


def test_prefixes_of_another_salt_are_not_found(make_engine):
    engine = make_engine()
    requests = [ask([*SYSTEM, *[40] * i], cache_salt=salt) for i, salt in enumerate("abba ")]
    assert [run(engine, request)[0][1] for request in requests] == [0, 0, 101, 100, 0]


@pytest.mark.parametrize("values", [{"prompt_logprobs": 0}, {"pooling": "mean"}])
def test_requests_that_need_each_token_of_the_prompt_compute_it(make_engine, values):
    engine = make_engine()
    run(engine, ask(SYSTEM[:-1]))
    new_tokens = 0 if "pooling" in values else 5
    assert run(engine, ask(SYSTEM, new_tokens, **values))[0][1] == 0
    assert run(engine, ask(SYSTEM, 0, pooling="last"))[0][1] == 99


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_preempted_request_continues_from_its_state(make_engine, layout):
    engine = make_engine(layout, max_running=1)
    alone = run(make_engine(layout), ask(SYSTEM, 40))[0][0]
    first = engine.add(ask(SYSTEM, 40, priority=1))
    tokens = [token for _ in range(20) for out in engine.step() for token in out.new_token_ids]
    ((_, cached),) = run_beside(engine, ask([1] * 50, 5), first, tokens)
    assert cached == 0
    assert tokens == alone
    assert engine.stats().preemptions == 1
    assert engine.stats().prompt_tokens == len(SYSTEM) + 50 + 1


def run_beside(engine, request, other, tokens):
    """Decode a request beside `other`, whose tokens are appended to `tokens`."""
    request_id, found = engine.add(request), ([], 0)
    while engine.has_work:
        for output in engine.step():
            if output.request_id == other:
                tokens += output.new_token_ids
            else:
                assert output.request_id == request_id
                found = [*found[0], *output.new_token_ids], output.cached_tokens
        engine.check_integrity()
    return [found]


@pytest.mark.parametrize("layout", ["attention", "hybrid"])
def test_pages_of_a_window_that_others_share_are_not_written_to(make_engine, layout):
    """Although a long prompt uses the pages again that leave its own window."""
    engine = make_engine(layout, prompt_tokens_per_step=16)
    alone = make_engine(layout, prefix_cache_gib=0)
    run(engine, ask(SYSTEM, 1))
    for rest in (SYSTEM, [5] * 9):
        prompt = [*SYSTEM, *rest]
        assert run(engine, ask(prompt)) == [(run(alone, ask(prompt))[0][0], len(SYSTEM))]


def test_rows_get_their_pages_before_snapshots(make_engine):
    """Snapshots at the end of a page take no bytes but those of pages."""
    engine = make_engine("attention", max_running=2, prefix_cache_gib=0.0001)
    for first in range(40):
        run(engine, ask([first + 3, *SYSTEM[:47]], 1), ask([first + 43, *SYSTEM[:47]], 1))
    assert 0 < engine._caches.attention.num_kept <= engine._caches.attention.num_free


@pytest.mark.parametrize("layout", LAYOUTS)
def test_least_recently_used_prefixes_go_first(make_engine, layout):
    """However little room there is, what is found is right."""
    room = {"attention": 0.001, "hybrid": 0.0008, "stu": 0.0004}[layout]
    engine = make_engine(layout, max_running=2, prefix_cache_gib=room)
    alone = make_engine(layout, prefix_cache_gib=0)
    prompts = [[own + 30, *SYSTEM[: 90 + own]] for own in range(12)]
    for prompt in prompts:
        tokens, cached = run(engine, ask(prompt, 3))[0]
        assert (tokens, cached) == (run(alone, ask(prompt, 3))[0][0], 0)
        assert run(engine, ask([*prompts[1][:92], 7], 3))[0][1] == (prompt != prompts[0]) * 92
    assert run(engine, ask([*prompts[-1], 7], 3))[0][1] == len(prompts[-1])
    assert run(engine, ask([*prompts[2], 7], 3))[0][1] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_invariant_logits_do_not_depend_on_what_is_remembered(make_engine, layout):
    """To the last bit, in float32."""
    prompt = [*SYSTEM, *SYSTEM, *SYSTEM, *[9] * 10]

    def decode(settings, *before):
        engine = make_engine(layout, torch.float32, batch_invariant=True, **settings)
        for request in before:
            run(engine, request)
        logits, decode_step = [], engine._runner.decode
        engine._runner.decode = lambda tokens: logits.append(decode_step(tokens)) or logits[-1]
        ((tokens, cached),) = run(engine, ask(prompt, 40))
        return tokens, cached, torch.stack(logits)

    tokens, cached, logits = decode({"prefix_cache_gib": 0})
    assert cached == 0
    others = [ask(prompt[:300], 1), ask([*prompt[:290], 8], 5), ask(prompt, 7)]
    found_tokens, cached, found = decode({}, *others)
    assert cached == 256
    assert found_tokens == tokens
    assert torch.equal(found, logits)


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"layout": "hyena", "prefix_cache_gib": 0.01}, "leave it out"),
        ({"convolution_cache": "pages", "prefix_cache_gib": 0.01}, "leave it out"),
        ({"prefix_cache_gib": 0.05}, "lower it"),
        ({"prefix_cache_gib": 1e-6}, "raise it"),
        ({"prefix_cache_gib": -1}, "0 or above"),
    ],
)
def test_prefix_caches_that_cannot_be_are_refused(make_engine, settings, fix):
    with pytest.raises(UserError, match=f"prefix_cache_gib=.*{fix}"):
        make_engine(**settings)


def test_requests_that_generate_nothing_leave_snapshots_only_where_prompts_part(make_engine):
    engine = make_engine(prompt_tokens_per_step=32)
    for own in (50, 51):
        run(engine, ask([*SYSTEM[:70], *[own] * 30], 0, pooling="last"))
    assert run(engine, ask([*SYSTEM[:70], *[50] * 40]))[0][1] == 64


def test_a_group_shares_a_step_although_a_prefix_was_dropped(make_engine):
    """Room for rows drops the prefix that was found when the group was made; one is aborted."""
    engine = make_engine("stu", prompt_tokens_per_step=128)
    run(engine, ask(SYSTEM, 1))
    first, second = ask([5] * 30, 5), ask([*SYSTEM, *[6] * 40], 5)
    found = [engine.add(first), engine.add(second)]
    make_room = engine._prefixes.make_room

    def drop_all():
        engine._prefixes._cache._max_bytes = 0
        make_room()

    engine._prefixes.make_room = drop_all
    engine.step()
    assert engine._scheduler.prefilling == []
    engine.abort(found[0])
    while engine.has_work:
        engine.step()
        engine.check_integrity()


def test_a_request_moved_from_another_engine_counts_its_prompt_alone(make_engine):
    engine = make_engine()
    ((tokens, _),) = run(engine, ask(SYSTEM, 20))
    moved = ask(SYSTEM, 40, new_token_ids=tuple(tokens))
    assert run(engine, moved)[0][1] == len(SYSTEM)
    assert engine.stats().prefix_tokens_found == len(SYSTEM)


def test_requests_that_wait_for_a_prefix_do_not_hold_up_others(make_engine):
    engine = make_engine(max_running=8)
    for own in (40, 50, 60):
        for _ in range(2):
            engine.add(ask([own, *SYSTEM], 20))
    engine.step()
    assert [job.request_id for job in engine._scheduler.running] == [0, 2, 4]
    engine.step()
    assert [job.request_id for job in engine._scheduler.running] == [0, 2, 4, 1, 3, 5]


def test_no_two_pairs_of_an_adapter_and_a_salt_share_prefixes():
    pairs = [
        ("a\0b", "c"),
        ("a", "b\0c"),
        ("a", ""),
        ("", "a"),
        ("1 a", ""),
        ("", "1 a"),
        ("1", " a"),
    ]
    salts = [make_request([1], 1, adapter=a, cache_salt=b).prefix_salt for a, b in pairs]
    assert len(set(salts)) == len(pairs)
