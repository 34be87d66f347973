"""Requests that continue in another engine from the tokens that they have."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from serve.sampling_params import SamplingParams
from stu.model import FlashSTU
from tests.models import float64_model
from tests.serve.requests import decode, make_request

SETTINGS = {
    "greedy": SamplingParams(logprobs=2),
    "random": SamplingParams(temperature=1.0, top_p=0.9, seed=7),
    "penalties": SamplingParams(temperature=0.8, frequency_penalty=1.0, repetition_penalty=1.2),
}


QUICK = [
    *[("hybrid", True, "greedy"), ("hybrid", True, "penalties"), ("hyena", True, "random")],
    *[("hybrid", False, "random"), ("hyena", False, "penalties")],
]


@pytest.mark.parametrize(
    ("layout", "batch_invariant", "settings"),
    [
        *QUICK,
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in product(["hybrid", "hyena"], [False, True], sorted(SETTINGS))
            if case not in QUICK
        ),
    ],
)
def test_continued_request_ends_as_it_would_have(
    code_model, code_tokenizer, settings, batch_invariant, layout
):
    """To the last bit of every logprob where the engine is batch invariant, although it decodes
    other requests too."""
    torch.manual_seed(0)
    config = replace(code_model.config, layout=layout)
    model = FlashSTU(config).eval() if batch_invariant else float64_model(config)

    def decode_all(*requests):
        return decode(model, code_tokenizer, requests, page_len=4, batch_invariant=batch_invariant)

    prompt = [code_tokenizer.bos_id, *code_tokenizer.encode("def f(")]
    request = make_request(prompt, 25, SETTINGS[settings], stop=["zzz"])
    others = [make_request([1, 2, 3], 15), make_request([5] * 30, 9)]
    (whole,) = decode_all(request)
    assert len(whole.token_ids) == 25
    for count in (1, 7, 24):
        (head,) = decode_all(make_request(prompt, count, SETTINGS[settings], stop=["zzz"]))
        continued = replace(request, new_token_ids=whole.token_ids[:count])
        *_, rest = decode_all(*others, continued)
        assert rest.token_ids == whole.token_ids[count:]
        assert rest.finish_reason == whole.finish_reason
        # Text held back, for a whole character or a stop string, comes after the continuation.
        assert whole.text.endswith(rest.text)
        assert head.text.startswith(whole.text.removesuffix(rest.text))
        if settings == "greedy":
            assert [logprob.token for logprob in rest.logprobs] == rest.token_ids
        if batch_invariant:
            assert rest.logprobs == whole.logprobs[count:]


def test_stop_string_that_began_in_another_engine_is_found(code_model, code_tokenizer):
    def decode_one(request):
        (completion,) = decode(
            code_model, code_tokenizer, [request], page_len=4, batch_invariant=True
        )
        return completion

    prompt, params = [code_tokenizer.bos_id], SamplingParams(temperature=1.0, seed=3)
    text = decode_one(make_request(prompt, 20, params)).text
    stop = text[4:9]
    request = make_request(prompt, 20, params, stop=[stop])
    whole = decode_one(request)
    assert (whole.text, whole.finish_reason) == (text[: text.index(stop)], "stop")
    for count in range(1, len(whole.token_ids)):
        rest = decode_one(replace(request, new_token_ids=whole.token_ids[:count]))
        assert rest.finish_reason == "stop"
        assert whole.text.endswith(rest.text)
