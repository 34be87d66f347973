"""The engine against each request decoded alone by direct sums."""

import json
import math
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.adapters.folder import Adapter, Narrow
from serve.cache.budget import make_caches
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.job import Job
from serve.engine.packing import packs
from serve.engine.stats import Stats
from serve.request import Request
from serve.sampling.chooser import Choice, TokenChooser
from serve.sampling_params import SamplingParams
from serve.wire import pack, request_from_wire, request_to_wire, unpack
from stu import layouts
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.decoding.memory import usual_rank
from stu.mixers import PastInputs, planned_mixers, remembered
from stu.model import FlashSTU
from stu.online_convolution import Naive
from stu.tokenizers.sentence_piece import train_bpe
from tests.models import float64_model
from tests.reference import sampling as reference
from tests.reference.decoding import Runner as Lockstep
from tests.serve.requests import REQUEST_FIELDS, make_request
from tests.stu.own_mixers import FadingSTU, TwoStreams

CONFIGS = {
    "stu": {"layout": "stu"},
    "hybrid": {"layout": "hybrid", "window_tokens": 10},
    "full": {"layout": "stu", "stu_form": "full", "num_filters": 2, "num_layers": 1},
    "hyena": {"layout": "hyena"},
    "attention": {"layout": "attention", "window_tokens": 10},
}
MIXED = ["attention", "hybrid", "hyena", "stu"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = ["the cat sat on the mat\n", "a dog and a cat\n"] * 5
    return train_bpe(texts, 280, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def make_engine(tokenizer):
    """Return a function of a kind or a model, and settings."""

    def make(model="stu", static=None, adapters=(), **settings):
        config = EngineConfig(**{"cache_gib": 0.01, "page_len": 8, **settings})
        return Engine(MODELS.get(model, model), tokenizer, config, static, adapters)

    return make


def build(kind, **settings):
    torch.manual_seed(1)
    shape = {"width": 8, "num_layers": 3, "num_heads": 2, "mlp_ratio": 2, "num_filters": 4}
    config = ModelConfig(vocab_size=280, max_seq_len=256, **{**shape, **CONFIGS[kind], **settings})
    return float64_model(config)


MODELS = {kind: build(kind) for kind in CONFIGS}


def decode_alone(model, request):
    """Return the request's tokens and logprobs, by direct sums over its whole past."""
    params, prompt = request.sampling, request.prompt_token_ids
    if params.max_new_tokens == 0:
        return [], []
    runner = Lockstep(model, [prompt], params.max_new_tokens, Naive)
    logits, tokens, logprobs = runner.prefill(), [], []
    while True:
        row = logits[0].tolist()
        banned = params.stop_token_ids if len(tokens) < params.min_new_tokens else ()
        allowed = [-math.inf if at in banned else logit for at, logit in enumerate(row)]
        token = reference.sample(allowed, params, len(prompt) + len(tokens), prompt, tokens)
        if params.logprobs is not None:
            logprobs.append((token, *reference.logprobs(row, token, params.logprobs)))
        tokens.append(token)
        if token in params.stop_token_ids or len(tokens) == params.max_new_tokens:
            return tokens, logprobs
        logits = runner.step(torch.tensor([token]))


def prompt_logprobs(model, request):
    """Return the logprobs of the request's prompt, by the model's full forward pass."""
    count, prompt = request.sampling.prompt_logprobs, request.prompt_token_ids
    if count is None:
        return []
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[0].tolist()
    return [
        (token, *reference.logprobs(row, token, count))
        for row, token in zip(logits, prompt[1:], strict=False)
    ][request.prompt_logprobs_from - 1 :]


def embedding(model, request):
    """Return the request's embedding, from the model's full forward pass."""
    if request.pooling is None:
        return ()
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([request.prompt_token_ids]))[0]
    return (hidden.mean(0) if request.pooling == "mean" else hidden[-1]).tolist()


def poison(caches):
    """Fill caches with NaN, which shows if it is read before it is written."""
    for cache in caches.all:
        for name in ("_states", "_inputs", "_pending", "_narrow"):
            for tensor in getattr(cache, name, []):
                tensor.fill_(math.nan)
        if cache.pool is not None:
            cache.pool.pages[1:] = math.nan
    if caches.recent is not None:
        for inputs in caches.recent._inputs:
            inputs[-1] = 0  # padding may be any finite number


def drain(engine, answers):
    while engine.has_work:
        collect(engine, answers)
    return answers


def collect(engine, answers):
    """Run a step and extend the answers: tokens, finish reason, logprobs, prompt logprobs and
    embedding."""
    for output in engine.step():
        tokens, _, logprobs, of_prompt, _ = answers.get(output.request_id, ([], None, [], [], ()))
        answers[output.request_id] = (
            [*tokens, *output.new_token_ids],
            output.finish_reason,
            [*logprobs, *output.logprobs],
            [*of_prompt, *output.prompt_logprobs],
            output.embedding,
        )
    engine.check_integrity()


def check_logprobs(found, expected):
    assert len(found) == len(expected)
    for logprobs, (token, logprob, top, rank) in zip(found, expected, strict=True):
        assert (logprobs.token, logprobs.rank) == (token, rank)
        assert logprobs.logprob == pytest.approx(logprob, abs=1e-9)
        assert logprobs.top == pytest.approx(top, abs=1e-9)


samplings = st.one_of(
    st.just(SamplingParams()),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 1.0]),
        top_p=st.sampled_from([1.0, 0.8]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        frequency_penalty=st.sampled_from([0.0, 0.5]),
        logit_bias=st.sampled_from([{}, {7: 2.5}]),
        logprobs=st.sampled_from([None, 2]),
        seed=st.integers(0, 9),
    ),
)
PREFIX = [(7 * place + place // 3) % 280 for place in range(90)]
prompts = st.builds(
    lambda shared, own: [*PREFIX[:shared], *own],
    st.sampled_from([0, 40, 64, 90]),
    st.lists(st.integers(0, 279), min_size=1, max_size=50),
)
generating = st.builds(
    make_request,
    prompts,
    max_new_tokens=st.integers(0, 100),
    prompt_logprobs=st.sampled_from([None, 0, 2]),
    sampling=samplings,
    priority=st.integers(0, 1),
    stop_token_ids=st.lists(st.integers(0, 279), max_size=2),
    cache_salt=st.sampled_from(["", "", "other"]),
)
pooling = st.builds(
    make_request,
    prompts,
    max_new_tokens=st.just(0),
    prompt_logprobs=st.sampled_from([None, 1]),
    pooling=st.sampled_from(["mean", "last"]),
    cache_salt=st.sampled_from(["", "other"]),
)
completing = st.builds(
    lambda prompt, completion: make_request(
        prompt + completion, 0, prompt_logprobs=0, prompt_logprobs_from=len(prompt)
    ),
    prompts,
    st.lists(st.integers(0, 279), max_size=60),
)
requests = generating | pooling | completing


@given(
    kind=st.sampled_from(sorted(CONFIGS)),
    traffic=st.lists(st.tuples(st.integers(0, 60), requests), min_size=1, max_size=7),
    aborts=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 6)), max_size=2),
    config=st.fixed_dictionaries(
        {
            "page_len": st.sampled_from([2, 8, 32]),
            "prompt_tokens_per_step": st.sampled_from([5, 40, 300]),
            "expected_new_tokens": st.sampled_from([None, 1, 20]),
            "convolution_cache": st.sampled_from([None, "pages"]),
            "overlap": st.booleans(),
            "static": st.booleans(),
        }
    ),
    spare_bytes=st.integers(0, 30_000),
    prefix_bytes=st.sampled_from([None, 0, 40_000, 10**6]),
)
@settings(max_examples=15, deadline=None)
def test_requests_decode_in_traffic_as_if_alone(
    make_engine, kind, traffic, aborts, config, spare_bytes, prefix_bytes
):
    model, times = MODELS[kind], 8 if kind == "full" else 1
    if kind == "hyena" or (config["convolution_cache"] == "pages" and kind != "attention"):
        prefix_bytes = None
    part = times * (prefix_bytes or 0)
    engine = make_engine(
        kind,
        cache_gib=(200_000 * times + part + spare_bytes) / 2**30,
        prefix_cache_gib=None if prefix_bytes is None else part / 2**30,
        max_running=3,
        **config,
    )
    poison(engine._caches)
    expected, answers, refused = {}, {}, 0
    for step in range(82):
        for arrival, request in traffic:
            if arrival == step:
                try:
                    expected[engine.add(request)] = request
                except ValueError:
                    refused += 1
        for at, request_id in aborts:
            if at == step:
                engine.abort(request_id)
        collect(engine, answers)
    drain(engine, answers)
    assert len(expected) + refused == len(traffic)
    assert set(answers) == set(expected)
    for request_id, request in expected.items():
        tokens, reason, logprobs, of_prompt, found = answers[request_id]
        whole, expected_logprobs = decode_alone(model, request)
        if tokens or reason == "length":
            check_logprobs(of_prompt, prompt_logprobs(model, request))
            assert found == pytest.approx(embedding(model, request), abs=1e-9)
        if reason == "abort":
            assert tokens == whole[: len(tokens)]
            check_logprobs(logprobs, expected_logprobs[: len(tokens)])
        else:
            assert tokens == whole
            check_logprobs(logprobs, expected_logprobs)
            is_stopped = tokens and tokens[-1] in request.sampling.stop_token_ids
            assert reason == ("stop" if is_stopped else "length")
    stats = engine.stats()
    assert stats.convolution_pages_used == stats.attention_pages_used == 0


@pytest.mark.parametrize(
    "kind",
    [
        *("full", "hybrid", "hyena"),
        # Their layers are those of `hybrid`.
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("attention", "stu")),
    ],
)
def test_short_prompts_decode_with_pages_of_any_length(make_engine, kind):
    """More requests than rows, prefilled together."""
    params = SamplingParams(temperature=1.0, seed=3, logprobs=2)
    requests = [
        make_request([*range(3, 3 + prompt_len)], new_tokens, params)
        for new_tokens in (1, 2, 3, 9, 40)
        for prompt_len in (1, 2, 3, 4, 17)
    ]
    expected = [decode_alone(MODELS[kind], request) for request in requests]
    for page_len in (2, 16, 64):
        engine = make_engine(kind, page_len=page_len, max_running=3)
        poison(engine._caches)
        for request in requests:
            engine.add(request)
        answers = drain(engine, {})
        for request_id, (tokens, logprobs) in enumerate(expected):
            assert answers[request_id][0] == tokens
            check_logprobs(answers[request_id][2], logprobs)


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("prompt_len", [1, 16, 150])
@pytest.mark.parametrize("new_tokens", [2, 9, 17, 100])
def test_request_owns_as_many_pages_as_it_needs(make_engine, kind, prompt_len, new_tokens):
    """Convolution pages of all its new tokens from the start, and attention pages of its window."""
    page_len, window = 8, MODELS[kind].config.window_tokens
    engine = make_engine(kind, page_len=page_len, max_running=1, convolution_cache="pages")
    engine.add(make_request([3] * prompt_len, new_tokens))
    convolution, attention = [], []
    while engine.has_work:
        engine.step()
        convolution.append(engine.stats().convolution_pages_used)
        attention.append(engine.stats().attention_pages_used)
    assert convolution == sorted(convolution, reverse=True)
    assert convolution[0] == (-(-(new_tokens - 1) // page_len) if kind != "attention" else 0)
    assert convolution[-1] == attention[-1] == 0
    at_once = min(-(-window // page_len) + 1, -(-(prompt_len + new_tokens - 1) // page_len))
    assert max(attention) <= (at_once if kind in ("hybrid", "attention") else 0)
    if kind != "attention":
        shape = MODELS[kind].config
        layers = len(remembered(planned_mixers(shape), PastInputs))
        page_bytes = layers * shape.width * page_len * 8  # of float64
        assert engine._caches.convolution.pool.page_bytes == page_bytes


@pytest.mark.parametrize("temperature", [0, 1])
def test_no_stop_token_comes_before_min_new_tokens(make_engine, temperature):
    """The logprobs still have the stop tokens."""
    model, sampling = MODELS["stu"], SamplingParams(temperature, seed=5, logprobs=1)
    free, _ = decode_alone(model, make_request([1, 50], 20, sampling))
    stops = sorted({free[0], free[2], free[7]})
    engine = make_engine()
    for least in (0, 1, 3, 8, 20):
        request = make_request([1, 50], 20, sampling, stop_token_ids=stops, min_new_tokens=least)
        request_id = engine.add(request)
        tokens, reason, logprobs, *_ = drain(engine, {})[request_id]
        expected, expected_logprobs = decode_alone(model, request)
        assert tokens == expected
        check_logprobs(logprobs, expected_logprobs)
        assert len(tokens) > least or reason == "length"
        assert not set(tokens[:least]) & set(stops)
    request_id = engine.add(make_request([1], 5, stop_token_ids=[*range(280)], min_new_tokens=1))
    assert drain(engine, {})[request_id][1] == "error"


def test_requests_that_can_never_be_decoded_are_refused_with_the_numbers(make_engine):
    engine = make_engine(cache_gib=3e-5, max_running=1, convolution_cache="pages")
    for request, message in (
        (make_request([1] * 50, 200), r"need 25 convolution pages .* the cache has \d+: lower"),
        (
            make_request([1] * 200, 57),
            "maximum context length is 256 .* are 257: lower the limit of new tokens to 56 or",
        ),
        (
            make_request([1, 280], 3),
            "prompt is not allowed: it has the id 280, and the vocabulary ids 0 to 279: use",
        ),
        (
            make_request([1], 3, new_token_ids=[280]),
            "new_token_ids is not allowed: it has the id 280",
        ),
        (
            make_request([1], 3, stop_token_ids=[280]),
            "stop_token_ids is not allowed: it has the id 280",
        ),
        (
            make_request([1], 3, SamplingParams(logit_bias={999: 1.0})),
            "logit_bias is not allowed: it has the id 999",
        ),
    ):
        with pytest.raises(UserError, match=message):
            engine.add(request)
    assert not engine.has_work
    assert engine.step() == []
    accepted = engine.add(make_request([1], 2))
    assert drain(engine, {})[accepted][1] == "length"
    with pytest.raises(UserError, match=r"cache.gib=.* is too little: .* give at least"):
        make_engine("hybrid", cache_gib=1e-6)


MALFORMED = {
    "prompt_token_ids": [[], [1.5], [True], [-1], "abc", None],
    "new_token_ids": [[-1]],
    "sampling": [None],
    "priority": ["high", math.nan],
    "max_new_tokens": [-1, 2.0, True, math.nan, "3"],
    "prompt_logprobs": [21, True],
    "stop_token_ids": [[1.5], 5],
    "n": [0, 2**31],
    "best_of": [0, 2**31],
    "truncate_prompt_tokens": [0, 2**31, 2**64],
    "top_k": [2**31],
    "logit_bias": [{1: 10**400}],
    "temperature": [10**400],
    "stop_at_eos": [1],
    "stop": ["", [""], [5], None],
    "pooling": ["max", True],
    "prompt_logprobs_from": [0, 2, True],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in MALFORMED.items() for value in values]
)
def test_malformed_requests_are_refused(field, value):
    if field == "prompt_token_ids":
        make = Request
    else:
        make = partial(Request, [1]) if field in REQUEST_FIELDS else SamplingParams
    with pytest.raises(UserError, match=f"{field}=.* is not allowed: "):
        make(**{field: value})


def test_settings_can_be_sent_to_other_processes():
    sent = SamplingParams(temperature=10**30, logit_bias={3: 2}, presence_penalty=1)
    request = Request([1], sent, priority=-5)
    assert request_from_wire(unpack(pack(request_to_wire(request)))) == request
    assert (sent.temperature, sent.logit_bias) == (1e30, {3: 2.0})
    with pytest.raises(UserError, match="stop is not allowed: it has half of a surrogate pair"):
        SamplingParams(stop=["x", "a\ud800"])
    with pytest.raises(UserError, match="adapter is not allowed: it has half"):
        Request([1], adapter="\ud800")


def test_request_copies_its_prompt():
    tokens = [3, 4]
    request = make_request(tokens, 5)
    tokens.append(999)
    assert list(request.prompt_token_ids) == [3, 4]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("cache_gib", value) for value in (0, True, "1")],
        *[("page_len", value) for value in (12, 2.0, 8192)],
        *[("max_running", value) for value in (2.5, 0)],
        ("prompt_tokens_per_step", 1.5),
        ("expected_new_tokens", 0),
        ("batch_invariant", "no"),
    ],
)
def test_wrong_settings_are_refused(name, value):
    with pytest.raises(UserError, match=f"{name}=.* is not allowed: it must be "):
        EngineConfig(**{name: value})


def test_models_that_cannot_be_served_are_refused(make_engine):
    with pytest.raises(UserError, match="the tokenizer has 280 tokens and the model"):
        make_engine(FlashSTU(ModelConfig(vocab_size=300, max_seq_len=64)))
    model = build("stu")
    with torch.no_grad():
        model.blocks[0].mixer.filter_matrix[0, 0] = math.inf
    with pytest.raises(UserError, match="filters are not finite"):
        make_engine(model)
    with pytest.raises(UserError, match=r"batch.invariant is not allowed for width=8: "):
        make_engine("full", batch_invariant=True)


@pytest.mark.parametrize("kind", MIXED)
def test_running_requests_advance_while_a_long_prompt_is_prefilled(make_engine, kind):
    """Also when the long prompt is aborted."""
    engine, answers = make_engine(kind, prompt_tokens_per_step=40), {}
    first = engine.add(make_request([1], 60, SamplingParams(repetition_penalty=1.3)))
    collect(engine, answers)
    long = engine.add(make_request([2] * 200, 5))
    kept = engine.add(make_request([4] * 15, 5))
    for step in range(1, 4):
        collect(engine, answers)
        assert len(answers[first][0]) == 1 + step
        assert long not in answers
    for request_id in (long, long, 99):
        engine.abort(request_id)
    drain(engine, answers)
    assert answers[long][:2] == ([], "abort")
    expected = decode_alone(MODELS[kind], make_request([4] * 15, 5))[0]
    assert answers[kept][:2] == (expected, "length")
    stats = engine.stats()
    num_chunks = 0 if kind == "hyena" else 3  # its layers take a prompt as a whole
    assert (stats.prompt_tokens, stats.new_tokens) == (1 + num_chunks * 40 + 15, 65)
    assert not engine._texts
    assert not engine._chooser._states


@pytest.mark.parametrize("kind", MIXED)
def test_short_prompt_gets_its_first_token_within_two_steps(make_engine, kind):
    engine, answers = make_engine(kind, max_running=8, prompt_tokens_per_step=64), {}
    for _ in range(7):
        engine.add(make_request([1] * 60, 90))
    while engine.stats().new_tokens < 30:
        collect(engine, answers)
    for _ in range(3):  # of lower priority
        engine.add(make_request([2] * 60, 90, priority=1))
    short = engine.add(make_request([4, 5], 3))
    for _ in range(2):
        collect(engine, answers)
    assert answers[short][0]


def test_a_step_does_not_go_through_all_requests_that_wait(make_engine, monkeypatch):
    engine, order, looks = make_engine(max_running=2), Job.order.fget, []
    for number in range(500):
        engine.add(make_request([5], 2 + number % 7))
    monkeypatch.setattr(Job, "order", property(lambda job: looks.append(job) or order(job)))
    for _ in range(10):
        engine.step()
    assert len(looks) < 100


def test_abort_alone_is_work(make_engine):
    engine = make_engine()
    engine.abort(engine.add(make_request([1], 5)))
    assert engine.has_work
    assert [output.finish_reason for output in engine.step()] == ["abort"]
    assert not engine.has_work
    assert engine.stats().steps == 1


def test_request_that_just_fits_is_admitted(make_engine):
    """It may fill the context, and needs no page for its last token."""
    engine = make_engine(convolution_cache="pages")
    engine.add(make_request([1] * 200, 56))
    engine.add(make_request([1], 17))
    engine.step()
    assert engine.stats().convolution_pages_used == 7 + 2
    config = EngineConfig(cache_gib=3e-5, page_len=8, max_running=1, convolution_cache="pages")
    num_pages = make_caches(MODELS["stu"], config).capacity.convolution
    engine = make_engine(cache_gib=3e-5, max_running=1, convolution_cache="pages")
    engine.add(make_request([1], 8 * num_pages + 1))
    with pytest.raises(UserError, match=f"need {num_pages + 1} convolution pages"):
        engine.add(make_request([1], 8 * num_pages + 2))


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.parametrize("num_bytes", [60e3, 100e3, 250e3])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("convolution_cache", ["pages", None])
def test_caches_keep_to_their_budget(kind, num_bytes, batch_invariant, convolution_cache):
    gib = num_bytes * (8 if kind == "full" else 1) / 2**30
    config = EngineConfig(
        gib,
        page_len=4,
        max_running=5,
        batch_invariant=batch_invariant,
        convolution_cache=convolution_cache,
    )
    caches = make_caches(build(kind, width=16).float(), config)
    assert (caches.recent is not None) == (kind == "hyena")
    assert 0 < sum(cache.num_bytes for cache in caches.all) <= gib * 2**30


@pytest.mark.parametrize(
    ("kind", "wanted", "runs", "reason"),
    [
        ("stu", None, "state", ""),
        ("full", None, "state", ""),
        ("stu", "pages", "pages", "convolution_cache=pages"),
        (
            "hyena",
            None,
            "pages",
            "their filters are not weighted sums of a few and their filters do not alternate",
        ),
    ],
)
def test_stats_say_which_convolution_cache_runs(make_engine, kind, wanted, runs, reason):
    engine = make_engine(kind, max_running=3, convolution_cache=wanted)
    stats = engine.stats()
    info, cache = stats.convolution_cache, engine._caches.convolution
    assert (info.kind, info.reason) == (runs, reason)
    assert (info.rank > 0, info.error > 0) == (runs == "state", runs == "state")
    page_bytes = cache.num_bytes // 4 if runs == "state" else cache.pool.page_bytes
    assert info.page_bytes == page_bytes
    assert f"{page_bytes:,} bytes" in str(info)
    assert (reason or f"rank {info.rank}") in str(info)
    assert Stats.from_json(json.loads(json.dumps(asdict(stats)))) == stats


@pytest.mark.parametrize(
    ("mixers", "reason"),
    [
        (("fading",), ""),
        (("stu", "fading"), "the filters of their layers have different bases"),
        (("streams",), "their layers divide sequences into streams"),
    ],
)
def test_mixers_from_outside_decode_as_their_forward_pass(make_engine, monkeypatch, mixers, reason):
    for name, mixer in (("fading", FadingSTU), ("streams", TwoStreams)):
        monkeypatch.setitem(layouts.MIXERS, name, mixer)
    monkeypatch.setitem(layouts.LAYOUTS, "own", mixers)
    torch.manual_seed(1)
    shape = {"width": 8, "num_layers": 2, "num_heads": 2, "mlp_ratio": 2, "num_filters": 4}
    model = FlashSTU(ModelConfig(280, max_seq_len=256, layout="own", **shape)).eval()
    engine = make_engine(model, max_running=2)
    info = engine.stats().convolution_cache
    assert (info.kind, info.reason.split(" and ")[0]) == ("pages" if reason else "state", reason)
    planned = usual_rank(model.mixers[0].past, 256, 4)
    assert (planned is None) == (mixers == ("streams",))
    requests = [make_request([start, *range(1, 40)], 20, logprobs=0) for start in (5, 9)]
    for request in requests:
        engine.add(request)
    answers = drain(engine, {})
    for number, request in enumerate(requests):
        tokens, _, logprobs = answers[number][:3]
        with torch.inference_mode():
            logits = model(torch.tensor([[*request.prompt_token_ids, *tokens]]))[0, 39:-1]
        expected = logits.log_softmax(1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        assert [own.logprob for own in logprobs] == pytest.approx(expected, abs=1e-4)


def test_stats_without_convolutions(make_engine):
    assert make_engine("attention").stats().convolution_cache is None


@pytest.mark.parametrize(
    ("settings", "new_tokens", "preemptions"),
    [
        ({"max_running": 1}, [20, 20], 0),  # none by a request of equal priority
        # Room doubles each time.
        ({"expected_new_tokens": 1, "convolution_cache": "pages"}, [64], 5),
    ],
)
def test_preemptions(make_engine, settings, new_tokens, preemptions):
    engine = make_engine(**settings)
    for count in new_tokens:
        engine.add(make_request([1], count))
    drain(engine, {})
    assert engine.stats().preemptions == preemptions


@pytest.mark.parametrize("ending", ["abort", "stop", "length"])
def test_text_held_back_for_a_stop_string_comes_at_the_end(
    tokenizer, make_engine, monkeypatch, ending
):
    ids = [*tokenizer.encode("a cat sa"), 2]
    left, engine = iter(ids), make_engine()
    monkeypatch.setattr(TokenChooser, "read", lambda *_: [Choice(next(left), None, "", False)])
    most = len(ids) - 1 if ending == "length" else 50
    engine.add(make_request([1], most, stop=["sat"], stop_token_ids=[2]))
    outputs = [output for _ in ids[:-1] for output in engine.step()]
    if ending == "abort":
        engine.abort(0)
    *before, last = [*outputs, *engine.step()]
    assert "".join(output.text for output in before) == "a cat "
    assert (last.text, last.finish_reason) == ("sa", ending)


def test_logits_that_are_not_finite_end_their_request_only(make_engine):
    engine = make_engine()
    decode, answers = engine._runner.decode, {}
    requests = [make_request([row + 1], 20) for row in range(3)]
    for request in requests:
        engine.add(request)
    collect(engine, answers)

    def damaged(tokens):
        logits = decode(tokens).clone()
        for row, job in enumerate(engine._scheduler.running):
            if job.request_id == 1 and len(job.new_token_ids) == 5:
                logits[row, 7] = math.nan
        return logits

    engine._runner.decode = damaged
    drain(engine, answers)
    for row, request in enumerate(requests):
        whole = decode_alone(MODELS["stu"], request)[0]
        expected = (whole[:5], "error") if row == 1 else (whole, "length")
        assert answers[row][:2] == expected


@pytest.mark.skipif(not packs(torch.ones(1)), reason="odd widths need packed weights")
@pytest.mark.parametrize(
    ("kind", "width", "change"),
    [
        *[("hybrid", 50, ""), ("hybrid", 6, ""), ("hyena", 8, "")],
        *[("hyena", 50, "plain"), ("stu", 50, "adapter")],
        *(
            pytest.param(kind, width, "", marks=pytest.mark.slow)
            for kind in MIXED
            for width in (8, 6, 50)
            if (kind, width) not in (("hybrid", 50), ("hybrid", 6), ("hyena", 8))
        ),
    ],
)
def test_batch_invariant_logits_are_equal_to_the_last_bit(make_engine, kind, width, change):
    """In float32, alone, with other requests, and after preemption."""
    changes = {"blocks": "plain"} if change == "plain" else {}
    model = build(kind, width=width, mlp_ratio=3, **changes).float()
    params = SamplingParams(temperature=1.0, seed=3)
    probe = make_request([5, 6, 7, 8], 40, params, priority=1)
    adapters = []
    if change == "adapter":
        narrow = Narrow(torch.randn(4, width), torch.randn(3 * width, 4))
        adapters = [Adapter("own", {"blocks.0.mlp.up": narrow}, 0.1)]
        probe = replace(probe, adapter="own")

    def decode(num_others, num_urgent):
        engine = make_engine(model, max_running=12, batch_invariant=True, adapters=adapters)
        logits = []
        decode_step = engine._runner.decode
        for i in range(num_others):
            engine.add(make_request([i + 1] * (i + 1), 20 + i, priority=1))
        request_id = engine.add(probe)

        def record(tokens):
            batch, result = engine._runner.batch(), decode_step(tokens)
            for job in engine._scheduler.running:
                is_new = job.num_new_seen + 1 == len(job.new_token_ids)
                if job.request_id == request_id and is_new and job.row in batch:
                    logits.append(result[batch.index(job.row)].clone())
            return result

        engine._runner.decode = record
        answers = {}
        for _ in range(20):
            collect(engine, answers)
        for i in range(num_urgent):
            engine.add(make_request([i + 9] * 4, 40, priority=0))
        drain(engine, answers)
        assert engine.stats().preemptions >= (num_urgent == 12)
        return answers[request_id][0], torch.stack(logits)

    tokens, logits = decode(0, 0)
    for num_others, num_urgent in ((7, 0), (3, 12)):
        found_tokens, found_logits = decode(num_others, num_urgent)
        assert found_tokens == tokens
        assert torch.equal(found_logits, logits)


def test_abort_of_one_of_several_scored_prompts_leaves_the_others(make_engine):
    engine = make_engine(cache_gib=0.05, page_len=16)
    ids = [engine.add(make_request([1, 5, 6, 7], 4, prompt_logprobs=2)) for _ in range(20)]
    engine.step()
    engine.abort(ids[3])
    answers = drain(engine, {})
    others = [answers[request_id][0] for request_id in ids if request_id != ids[3]]
    assert others == [others[0]] * 19


def test_scored_prompts_are_prefilled_in_smaller_steps(make_engine):
    """Log probabilities of 2,048 tokens take as long as four other steps; streams would wait."""

    def num_steps(requests):
        engine = make_engine(prompt_tokens_per_step=128)
        for request in requests:
            engine.add(request)
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        return engine.stats().steps, outputs

    scored = [make_request([1] * 16, 0, prompt_logprobs=20) for _ in range(8)]
    count, outputs = num_steps(scored)
    assert count == 4
    assert len(outputs) == 8
    assert len({str(output.prompt_logprobs) for output in outputs}) == 1
    assert num_steps([make_request([1] * 16, 1) for _ in range(8)])[0] == 1
    assert num_steps([make_request([1] * 64, 0, prompt_logprobs=20)])[0] > 1
