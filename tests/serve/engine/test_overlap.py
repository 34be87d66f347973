"""The host one step behind the device: what is decoded, when it is read, and what is dropped."""

import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.sampling_params import Constraint, SamplingParams
from stu.config import ModelConfig
from tests.models import float64_model
from tests.serve.requests import make_request

SHAPE = {"width": 16, "num_layers": 2, "num_heads": 2, "mlp_ratio": 2, "num_filters": 4}


@pytest.fixture(scope="module")
def model(code_tokenizer):
    torch.manual_seed(1)
    vocab_size = code_tokenizer.vocab_size
    config = ModelConfig(vocab_size=vocab_size, max_seq_len=256, window_tokens=10, **SHAPE)
    return float64_model(config)


@pytest.fixture(params=[False, True], ids=["usual", "static"])
def make_engine(request, model, code_tokenizer):
    def make(overlap=True, **settings):
        values = {"cache_gib": 0.01, "page_len": 8, "max_running": 4, "overlap": overlap}
        return Engine(model, code_tokenizer, EngineConfig(**{**values, **settings}), request.param)

    return make


def count_rows(engine):
    """Return a list to which the number of rows of each step is appended."""
    decode, counts = engine._runner.decode, []

    def decode_and_count(tokens):
        counts.append(len(tokens))
        return decode(tokens)

    engine._runner.decode = decode_and_count
    return counts


def run(engine, requests):
    """Return each request's tokens, reason to end and log probabilities."""
    results = {engine.add(request): ([], [], []) for request in requests}
    while engine.has_work:
        for output in engine.step():
            tokens, reasons, logprobs = results[output.request_id]
            assert reasons == [], "nothing comes after the last output"
            tokens += output.new_token_ids
            logprobs += output.logprobs
            reasons += [output.finish_reason] if output.finish_reason else []
        engine.check_integrity()
    return list(results.values())


def test_no_step_is_wasted_on_requests_that_end_by_length(make_engine):
    requests = [make_request([5 + i], 3 + 4 * i) for i in range(4)] + [make_request([7], 1)]
    rows = {}
    results = []
    for overlap in (False, True):
        engine = make_engine(overlap)
        counts = count_rows(engine)
        results.append(run(engine, requests))
        rows[overlap] = sum(counts)
    assert results[0] == results[1]
    assert rows[True] == rows[False] == sum(r.sampling.max_new_tokens - 1 for r in requests)


def test_request_that_stops_runs_once_more_and_that_token_is_dropped(make_engine):
    free = run(make_engine(False), [make_request([5, 6], 20)])[0][0]
    stop = next(token for token in free if free.index(token) > 4)
    request = make_request([5, 6], 20, stop_token_ids=[stop])
    counts = {}
    for overlap in (False, True):
        engine = make_engine(overlap)
        rows = count_rows(engine)
        assert run(engine, [request]) == [(free[: free.index(stop) + 1], ["stop"], [])]
        counts[overlap] = sum(rows)
    assert counts[True] == counts[False] + 1


def test_tokens_come_one_step_later(make_engine):
    arrivals = {}
    for overlap in (False, True):
        engine = make_engine(overlap)
        engine.add(make_request([5, 6, 7], 6))
        arrivals[overlap] = []
        for step in range(8):
            arrivals[overlap] += [step] * sum(len(o.new_token_ids) for o in engine.step())
    assert arrivals[True] == [step + 1 for step in arrivals[False]]


@pytest.mark.parametrize("num_steps", range(1, 9))
def test_abort_reads_what_is_in_flight_first(make_engine, num_steps):
    whole = run(make_engine(False), [make_request([5, 6, 7], 6)])[0][0]
    engine, found, reasons = make_engine(), [], []
    request_id = engine.add(make_request([5, 6, 7], 6))
    other = engine.add(make_request([8, 9], 20))
    for step in range(40):
        if step == num_steps:
            engine.abort(request_id)
            engine.check_integrity()
        for output in engine.step():
            if output.request_id == request_id:
                found += output.new_token_ids
                reasons += [output.finish_reason] if output.finish_reason else []
    assert found == whole[:num_steps]
    assert reasons == ["abort" if num_steps < 6 else "length"]
    assert not engine.has_work
    assert other != request_id
    assert engine.stats().convolution_pages_used == 0


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_preemption_loses_and_repeats_nothing(make_engine, batch_invariant):
    sampled = SamplingParams(temperature=1.0, seed=3)
    requests = [make_request([5 + i], 30, sampled, priority=1) for i in range(4)]
    urgent = [make_request([50 + i], 10, sampled) for i in range(3)]
    expected = run(make_engine(False), requests + urgent)
    engine = make_engine(batch_invariant=batch_invariant)
    results = {engine.add(request): [] for request in requests}
    for step in range(150):
        if step in (5, 9, 13):
            results[engine.add(urgent[(step - 5) // 4])] = []
        for output in engine.step():
            results[output.request_id] += output.new_token_ids
        engine.check_integrity()
    assert engine.stats().preemptions == 3
    assert list(results.values()) == [tokens for tokens, _, _ in expected]


def test_all_settings_choose_the_same_tokens(make_engine):
    settings = [
        SamplingParams(),
        SamplingParams(temperature=1.0, top_p=0.9, seed=1),
        SamplingParams(temperature=0.7, top_k=5, min_p=0.01, seed=2, logprobs=3),
        SamplingParams(repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=0.3),
        SamplingParams(logit_bias={9: 3.0}, logprobs=0, min_new_tokens=7, stop_token_ids=(9,)),
    ]
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    constraint = Constraint("json_schema", json.dumps(schema))
    requests = [make_request([5, 6, 7 + i], 12, own) for i, own in enumerate(settings)]
    requests.insert(
        2, make_request([5, 6], 30, constraint=constraint, stop_at_eos=True, priority=0)
    )
    expected = run(make_engine(False), requests)
    found = run(make_engine(), requests)
    for (tokens, reasons, logprobs), usual in zip(found, expected, strict=True):
        assert (tokens, reasons) == usual[:2]
        for own, theirs in zip(logprobs, usual[2], strict=True):
            assert own.logprob == pytest.approx(theirs.logprob, abs=1e-12)
            assert list(own.top) == list(theirs.top)


def test_logits_that_are_not_finite_end_their_request_only(make_engine):
    requests = [make_request([row + 1], 20) for row in range(3)]
    expected = run(make_engine(False), requests)
    engine = make_engine()
    decode, calls = engine._runner.decode, []

    def damaged(tokens):
        logits = decode(tokens).clone()
        calls.append(len(tokens))
        if len(calls) == 5:
            logits[1, 7] = math.nan
        return logits

    engine._runner.decode = damaged
    found = run(engine, requests)
    assert found[1] == (expected[1][0][:5], ["error"], [])
    assert [found[0], found[2]] == [expected[0], expected[2]]


def test_request_that_uses_up_its_pages_gets_more(make_engine):
    requests = [make_request([5 + i], 50) for i in range(3)]
    settings = {"convolution_cache": "pages", "expected_new_tokens": 3}
    expected, engine = run(make_engine(False), requests), make_engine(**settings)
    assert run(engine, requests) == expected
    assert engine.stats().preemptions > 6


def test_no_snapshot_is_left_of_logits_that_are_not_finite(make_engine):
    """The last token is read after its request has left its row with a snapshot."""
    request = make_request([*range(5, 45)], 3)
    expected = run(make_engine(), [request])
    engine = make_engine()
    decode, calls = engine._runner.decode, []

    def damaged(tokens):
        logits = decode(tokens).clone()
        calls.append(len(tokens))
        return logits.fill_(math.nan) if len(calls) == 2 else logits

    engine._runner.decode = damaged
    assert run(engine, [request]) == [(expected[0][0][:2], ["error"], [])]
    kept = engine._prefixes._cache._entries.values()
    assert kept
    assert max(entry.num_tokens for entry in kept) <= 40
    assert run(engine, [request]) == expected


class Indexed(TorchDispatchMode):
    """Records results of an index that is a list or a mask, for which the host waits on CUDA."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "index":
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("overlap", [False, True])
def test_the_host_waits_for_no_choice_of_rows(make_engine, overlap):
    """Where some of the logits have no token to come, or rows need different work."""
    engine, indexed = make_engine(overlap), Indexed()
    engine.add(make_request([5, 6], 0))
    engine.add(make_request([7, 8], 4))
    engine.add(make_request([9, 3], 4, SamplingParams(1.0, seed=1, logprobs=1)))
    vocab_size = engine._model_config.vocab_size
    with indexed:
        while engine.has_work:
            engine.step()
    assert [shape for shape in indexed.shapes if shape[-1:] == (vocab_size,)] == []
