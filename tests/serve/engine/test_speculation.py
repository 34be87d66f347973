"""Guesses of next tokens: the same tokens with and without them, whatever is guessed."""

import json
import random
from collections import Counter
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch

from serve.config import EngineConfig
from serve.engine.draft_step import DraftStep
from serve.engine.engine import Engine
from serve.engine.job import Job
from serve.engine.speculation import MOST_ROWS, Speculation
from serve.request import Request
from serve.sampling.chooser import TokenChooser
from serve.sampling.ngrams import Ngrams
from serve.sampling_params import Constraint, SamplingParams
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.tokenizers.sentence_piece import train_bpe
from tests.models import float64_model
from tests.serve.engine.test_engine import CONFIGS, poison
from tests.serve.requests import make_request

KINDS = {
    **{kind: (kind, None) for kind in ("stu", "hybrid", "full", "attention", "hyena")},
    **{f"{kind} in pages": (kind, "pages") for kind in ("stu", "hybrid", "full")},
}


def quick(*names):
    """Mark tests of the other kinds as slow."""
    return [kind if kind in names else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = ["the cat sat on the mat\n", "a dog and a cat\n"] * 5
    return train_bpe(texts, 280, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def models():
    """Models by kind, of a width at which products round alike in every place."""
    made = {}

    def model(kind):
        if kind not in made:
            torch.manual_seed(1)
            shape = {"width": 16, "num_layers": 3, "num_heads": 2, "mlp_ratio": 2, "num_filters": 4}
            values = {"vocab_size": 280, "max_seq_len": 256, **shape, **CONFIGS[kind]}
            made[kind] = float64_model(ModelConfig(**values))
        return made[kind]

    return model


@pytest.fixture
def make_engine(models, tokenizer):
    def make(kind="stu", **settings):
        values = {"cache_gib": 0.01, "page_len": 8, "max_running": 4, **settings}
        return Engine(models(kind), tokenizer, EngineConfig(**values))

    return make


def run(engine, arrivals):
    """Return the tokens, text, reasons to end and log probabilities of requests, by their number.

    arrivals: Pairs of a step and a request.
    """
    results, ids, step = {}, {}, 0
    waiting = list(enumerate(arrivals))
    poison(engine._caches)
    while waiting or engine.has_work:
        for number, (at, request) in list(waiting):
            if at <= step:
                ids[engine.add(request)] = number
                results[number] = ([], [], [], [])
                waiting.remove((number, (at, request)))
        for output in engine.step():
            tokens, texts, reasons, logprobs = results[ids[output.request_id]]
            assert reasons == [], "nothing comes after the last output"
            tokens += output.new_token_ids
            texts.append(output.text)
            logprobs += [asdict(own) for own in output.logprobs]
            reasons += [output.finish_reason] if output.finish_reason else []
        engine.check_integrity()
        step += 1
    return {number: (own[0], "".join(own[1]), *own[2:]) for number, own in results.items()}


@pytest.fixture
def oracle(monkeypatch):
    """Call with texts, and guesses are what follows in them, wrong now and then."""
    texts, choose = [], random.Random(3)

    def guess(ngrams, most):
        if most < 1:
            return []
        own = ngrams._tokens[: len(ngrams)].tolist()
        text = next(text for text in texts if text[: len(own)] == own)
        right = text[len(own) : len(own) + choose.randint(0, most)]
        return [choose.randrange(280) if choose.random() < 0.2 else token for token in right]

    monkeypatch.setattr(Ngrams, "guess", guess)
    monkeypatch.setattr(Ngrams, "learn", lambda self, num_right: None)  # never pauses
    return texts.extend


SETTINGS = [
    SamplingParams(logprobs=1),
    SamplingParams(temperature=1.0, seed=4, logprobs=2),
    SamplingParams(temperature=0.8, top_p=0.9, min_p=0.01, repetition_penalty=1.3, seed=1),
    SamplingParams(frequency_penalty=0.5, presence_penalty=0.4, logit_bias={7: 2.5}),
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
CONSTRAINT = Constraint("json_schema", json.dumps(SCHEMA))


def traffic(seed):
    """Return arrivals of requests with all kinds of settings. Some preempt others."""
    choose = random.Random(seed)
    arrivals = []
    for number, settings in enumerate(SETTINGS + SETTINGS[:2]):
        prompt = [choose.randrange(280) for _ in range(choose.choice([1, 3, 40]))]
        length = choose.choice([2, 30, 50])
        least = choose.choice([0, length // 2])
        values = {"min_new_tokens": least, "stop_token_ids": [choose.randrange(280)]}
        values |= {"stop": ["a"]} if number % 4 == 2 else {}
        priority = choose.randint(0, 1)
        request = make_request(prompt, length, settings, priority=priority, **values)
        arrivals.append((choose.randrange(60), request))
    constrained = make_request([5, 6], 30, constraint=CONSTRAINT, stop_at_eos=True)
    return [*arrivals, (3, constrained)]


@pytest.mark.parametrize("kind", quick("full", "hybrid", "stu in pages"))
def test_invariant_engine_generates_the_same_to_the_last_bit(make_engine, oracle, kind):
    name, cache = KINDS[kind]
    settings = {"convolution_cache": cache, "batch_invariant": True, "max_running": 3}
    arrivals = traffic(6)
    expected = run(make_engine(name, **settings), arrivals)
    oracle(
        [*request.prompt_token_ids, *expected[number][0]]
        for number, (_, request) in enumerate(arrivals)
    )
    engine = make_engine(name, speculate="ngram", **settings)
    assert run(engine, arrivals) == expected
    stats = engine.stats()
    assert 0.4 < stats.spec_decode_num_accepted_tokens / stats.spec_decode_num_draft_tokens < 1
    assert stats.spec_decode_num_drafts > 15
    assert stats.convolution_pages_used == stats.attention_pages_used == 0


@pytest.mark.parametrize("kind", quick("hybrid"))
def test_greedy_and_random_tokens_are_the_same_for_all_rows(make_engine, oracle, kind):
    """Rows of different lengths of drafts, which get ahead of one another and of new ones."""
    name, cache = KINDS[kind]
    arrivals = traffic(7)
    expected = run(make_engine(name, convolution_cache=cache), arrivals)
    oracle(
        [*request.prompt_token_ids, *expected[number][0]]
        for number, (_, request) in enumerate(arrivals)
    )
    found = run(make_engine(name, convolution_cache=cache, speculate="ngram"), arrivals)
    for number, (tokens, text, reasons, logprobs) in expected.items():
        assert found[number][:3] == (tokens, text, reasons)
        for own, theirs in zip(found[number][3], logprobs, strict=True):
            assert own["logprob"] == pytest.approx(theirs["logprob"], abs=1e-9)


def test_guesses_shorten_repetitive_text(make_engine):
    """The whole of it: n-grams found, confirmed, and counted."""
    request = make_request([3, 4, 5, 6] * 5, 100)
    counts = {}
    for speculate in (None, "ngram"):
        engine = make_engine(speculate=speculate)
        engine.add(request)
        while engine.has_work:
            engine.step()
        counts[speculate] = engine.stats()
    assert counts[None].steps >= 100
    assert counts["ngram"].steps < 60
    guessed = counts["ngram"]
    assert guessed.spec_decode_num_accepted_tokens == counts[None].steps - guessed.steps
    assert counts[None].spec_decode_num_drafts == 0


class Chain:
    """A step of drafts over a Markov chain, whose logits are those of the last token."""

    def __init__(self, logits):
        self._logits = logits

    def most_tokens(self, row):
        return None

    def run(self, rows, tokens):
        return [self._logits[torch.tensor(own)] for own in tokens]

    def accept(self, row):
        pass

    settle = accept

    def finish(self):
        pass


@pytest.mark.parametrize("count", [1500, pytest.param(20_000, marks=pytest.mark.slow)])
def test_distribution_of_tokens_is_that_of_the_model(tokenizer, monkeypatch, count):
    """Of tokens after right guesses, of those in place of wrong ones, and of all."""
    torch.manual_seed(0)
    states = 6
    logits = torch.full((280, 280), -torch.inf)
    logits[:states, :states] = 1.5 * torch.randn(states, states)
    monkeypatch.setattr(Ngrams, "learn", lambda self, num_right: None)  # never pauses
    monkeypatch.setattr("serve.sampling.ngrams.LEAST_EQUAL", 1)
    chooser = TokenChooser(tokenizer, torch.device("cpu"))
    params = SamplingParams(1.0, max_new_tokens=count + 8, stop_at_eos=False, seed=8)
    job = Job(0, Request([0], params), count, new_token_ids=[1], num_seen=1, steps_left=count + 8)
    chooser.add(0, job.request)
    chooser.append(0, 1)

    def take(job, choice):
        job.new_token_ids.append(choice.token)
        chooser.append(0, choice.token)

    speculation = Speculation(Chain(logits), 3, chooser, take)
    counts = Counter()
    while len(job.new_token_ids) < count:
        before = len(job.new_token_ids)
        if not speculation.decode([job]):
            job.see()
            (choice,) = chooser.choose([0], logits[job.new_token_ids[-1]][None])
            take(job, choice)
        counts.update(pairwise(job.new_token_ids[before - 1 :]))
    assert speculation.counts.num_draft_tokens > count / 2
    assert 0.1 < speculation.counts.num_accepted_tokens / speculation.counts.num_draft_tokens < 0.8
    for state in range(states):
        found = torch.tensor([counts[state, token] for token in range(states)]).double()
        expected = logits[state, :states].double().softmax(0) * found.sum()
        chi_squared = ((found - expected) ** 2 / expected).sum()
        assert chi_squared < 20.5  # of 5 degrees of freedom, once in a thousand


def test_nothing_is_guessed_for_many_rows(make_engine, monkeypatch):
    sizes = []
    run_step = DraftStep.run

    def counted(step, rows, tokens):
        sizes.append(list(map(len, tokens)))
        return run_step(step, rows, tokens)

    monkeypatch.setattr(DraftStep, "run", counted)
    engine = make_engine(max_running=8, speculate="ngram", num_speculative_tokens=15)
    requests = [make_request([3, 4, 5, 6] * 4, 30 + 4 * number) for number in range(7)]
    run(engine, [(0, request) for request in requests])
    assert sizes
    assert all(len(own) <= MOST_ROWS and sum(own) <= 16 for own in sizes)


@pytest.mark.parametrize("position", range(6))
def test_abort_and_stop_within_guesses_leave_no_page(make_engine, oracle, position):
    request = make_request([3, 4, 5], 40)
    ((tokens, *_),) = run(make_engine("hybrid"), [(0, request)]).values()
    oracle([[3, 4, 5, *tokens]])
    engine = make_engine("hybrid", speculate="ngram")
    stop = tokens[position]
    stopped = make_request([3, 4, 5], 40, stop_token_ids=[stop])
    found = run(engine, [(0, stopped)])[0]
    assert found[0] == tokens[: tokens.index(stop) + 1]
    assert found[2] == ["stop"]
    again = make_request([3, 4, 5], 40)
    number = engine.add(again)
    for _ in range(position):
        engine.step()
    engine.abort(number)
    while engine.has_work:
        engine.step()
    engine.check_integrity()
    assert engine.stats().convolution_pages_used == engine.stats().attention_pages_used == 0


def test_conversations_go_on_from_snapshots_after_guesses(make_engine, oracle):
    """The prefix cache remembers a text at the end of which guesses were wrong."""
    first = make_request([*range(3, 40)], 21)
    ((tokens, *_),) = run(make_engine("hybrid"), [(0, first)]).values()
    second = make_request([*range(3, 40), *tokens, 9, 8], 20)
    ((more, *_),) = run(make_engine("hybrid"), [(0, second)]).values()
    oracle([[*second.prompt_token_ids, *more]])
    engine = make_engine("hybrid", speculate="ngram")
    found = run(engine, [(0, first), (60, second)])
    assert (found[0][0], found[1][0]) == (tokens, more)
    assert engine.stats().prefix_tokens_found > 50


def test_settings_that_do_not_go_together_are_refused(models, tokenizer):
    for values, name in (
        ({"speculate": "ngram", "overlap": True}, "overlap"),
        ({"speculate": "draft"}, "speculate"),
        ({"speculate": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"speculate": "ngram", "num_speculative_tokens": 16}, "num_speculative_tokens"),
        ({"num_speculative_tokens": 3}, "num_speculative_tokens"),
    ):
        with pytest.raises(UserError, match=f"{name}=.* is not allowed"):
            EngineConfig(**values)
    with pytest.raises(UserError, match=r"speculate=\"ngram\" is not allowed: .* on CUDA"):
        Engine(models("stu"), tokenizer, EngineConfig(cache_gib=0.01, speculate="ngram"), True)
