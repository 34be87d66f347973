"""A request that continues in another engine, from the tokens it has, ends as it would have."""

from dataclasses import replace

import pytest
import torch

from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.sampling_params import SamplingParams
from stu.common.errors import UserError
from stu.model import FlashSTU
from tests.serve.requests import make_request

SETTINGS = {
    "greedy": SamplingParams(logprobs=2),
    "random": SamplingParams(temperature=1.0, top_p=0.9, seed=7),
    "penalties": SamplingParams(temperature=0.8, frequency_penalty=1.0, repetition_penalty=1.2),
}


def decode(model, tokenizer, requests, **config):
    """Each request's outputs, one behind the other: tokens, text, logprobs and finish reason."""
    engine = Engine(model, tokenizer, EngineConfig(cache_gib=0.01, page_len=4, **config))
    answers = {engine.add(request): ([], "", [], None) for request in requests}
    while engine.has_work:
        for its in engine.step():
            tokens, text, logprobs, _ = answers[its.request_id]
            answers[its.request_id] = (
                [*tokens, *its.new_token_ids],
                text + its.text,
                [*logprobs, *its.logprobs],
                its.finish_reason,
            )
        engine.check_integrity()
    return list(answers.values())


@pytest.mark.parametrize("settings", sorted(SETTINGS))
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("layout", ["hybrid", "hyena"])
def test_what_is_added_after_any_token_is_the_rest(
    code_model, code_tokenizer, settings, batch_invariant, layout
):
    """To the last bit of every logprob where the engine is batch invariant, though others run
    there."""
    torch.manual_seed(0)
    model = FlashSTU(replace(code_model.config, layout=layout)).eval()
    if not batch_invariant:
        model = model.double()
    prompt = [code_tokenizer.bos_id, *code_tokenizer.encode("def f(")]
    request = make_request(prompt, 25, SETTINGS[settings], stop=["zzz"])
    others = [make_request([1, 2, 3], 15), make_request([5] * 30, 9)]
    config = {"batch_invariant": batch_invariant}
    (tokens, text, logprobs, reason), *_ = decode(model, code_tokenizer, [request], **config)
    assert len(tokens) == 25
    for count in (1, 2, 7, 24):
        head = decode(
            model,
            code_tokenizer,
            [make_request(prompt, count, SETTINGS[settings], stop=["zzz"])],
            **config,
        )
        going_on = replace(request, new_token_ids=tokens[:count])
        *_, rest = decode(model, code_tokenizer, [*others, going_on], **config)
        assert tokens[:count] + rest[0] == tokens
        assert rest[3] == reason
        # What a whole character or a stop string held back comes with the rest.
        assert text.endswith(rest[1])
        assert head[0][1].startswith(text[: len(text) - len(rest[1])])
        if settings == "greedy":
            assert [its.token for its in rest[2]] == tokens[count:]
        if batch_invariant:
            assert rest[2] == logprobs[count:]


def test_a_stop_string_begun_before(code_model, code_tokenizer):
    """It is found, though its beginning came from another engine, and none of it is text."""
    prompt = [code_tokenizer.bos_id]
    free = make_request(prompt, 20, SamplingParams(temperature=1.0, seed=3))
    ((_, text, _, _),) = decode(code_model, code_tokenizer, [free], batch_invariant=True)
    stop = text[4:9]
    at = text.index(stop)
    stopping = make_request(prompt, 20, free.sampling, stop=[stop])
    ((own, whole, _, reason),) = decode(
        code_model, code_tokenizer, [stopping], batch_invariant=True
    )
    assert (whole, reason) == (text[:at], "stop")
    for count in range(1, len(own)):
        ((_, rest, _, its_reason),) = decode(
            code_model,
            code_tokenizer,
            [replace(stopping, new_token_ids=own[:count])],
            batch_invariant=True,
        )
        assert its_reason == "stop"
        assert whole.endswith(rest)


def test_given_tokens_are_checked(code_model, code_tokenizer):
    engine = Engine(code_model, code_tokenizer, EngineConfig(cache_gib=0.01))
    with pytest.raises(UserError, match="new_token_ids has the id 999"):
        engine.add(make_request([1], 5, new_token_ids=[999]))
    assert not engine.has_work
