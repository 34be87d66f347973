"""Whole answers to bodies with vLLM's fields, decoded in this process, against the model itself."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from serve.openai.chat import ChatCompletions
from serve.openai.completions import TextCompletions
from serve.prompts import RequestBuilder
from stu.chat.template import ChatTemplate
from stu.common.errors import UserError
from tests.serve.requests import decode

EOS = 2
PROMPT = [1, 100, 101, 102, 103, 104]
SETTINGS = {"max_tokens": 8, "seed": 5, "ignore_eos": True}
LIKELY_EOS = {"ignore_eos": False, "logit_bias": {"2": 2}}
HI = [{"role": "user", "content": "def f(x)"}]


@pytest.fixture(scope="module")
def endpoints(code_tokenizer):
    common = {
        "builder": RequestBuilder(code_tokenizer, {"max_new_tokens": 9, "temperature": 1.0}),
        "tokenizer": code_tokenizer,
        "model_name": "demo",
        "max_seq_len": 64,
    }
    template = ChatTemplate(Path("nothing"), code_tokenizer)
    return TextCompletions(**common), ChatCompletions(template, 9, **common)


@pytest.fixture(scope="module")
def ask(endpoints, code_model, code_tokenizer):
    """Return the answer to a body, of a chat if it has messages."""

    def answer(**body):
        endpoint = endpoints["messages" in body]
        read = endpoint.read({**SETTINGS, **body})
        requests = endpoint.requests(3, read)
        return endpoint.answer(0, read, requests, decode(code_model, code_tokenizer, requests))

    return answer


@pytest.fixture(scope="module")
def logprobs_of(code_model):
    """Return the log probabilities of all tokens after each token of a text."""

    def compute(tokens):
        with torch.no_grad():
            return code_model(torch.tensor([tokens]))[0].double().log_softmax(-1)

    return compute


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_best_of_returns_the_completions_with_the_largest_sums(
    ask, endpoints, code_model, code_tokenizer, logprobs_of, kind
):
    """Sums of the log probabilities of all tokens, EOS included where it ended the text."""
    asked = {"messages": HI} if kind == "chat" else {"prompt": [PROMPT, "x = "]}
    asked |= {**SETTINGS, **LIKELY_EOS, "max_tokens": 12}
    endpoint = endpoints[kind == "chat"]
    requests = endpoint.requests(3, endpoint.read({**asked, "n": 6}))
    sums, texts, expected = [], [], []
    for request, found in zip(requests, decode(code_model, code_tokenizer, requests), strict=True):
        prompt, new = list(request.prompt_token_ids), list(found.token_ids)
        new += [EOS] * (found.finish_reason == "stop")
        rows = logprobs_of(prompt + new)[len(prompt) - 1 :]
        sums.append(sum(row[token].item() for row, token in zip(rows, new, strict=False)))
        texts.append((found.text, found.finish_reason))
    for first in range(0, len(requests), 6):
        order = sorted(range(first, first + 6), key=lambda at: -sums[at])[:2]
        assert order != [first, first + 1]
        expected += [texts[at] for at in order]
    assert len({reason for _, reason in texts}) == 2
    for logprobs in (False, True):
        more = {"logprobs": logprobs} if kind == "chat" else {"logprobs": 1 if logprobs else None}
        answer = ask(**asked, **more, n=2, best_of=6)
        choices = answer["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(expected)))
        assert all((choice["logprobs"] is not None) == logprobs for choice in choices)
        shown = [choice.get("text", choice.get("message", {}).get("content")) for choice in choices]
        reasons = [choice["finish_reason"] for choice in choices]
        assert list(zip(shown, reasons, strict=True)) == expected
        counts = [len(done.token_ids) for done in decode(code_model, code_tokenizer, requests)]
        assert answer["usage"]["completion_tokens"] == sum(counts)


def test_best_of_needs_at_least_n_and_no_stream(ask, endpoints):
    text, _ = endpoints
    for best_of, message in ((1, "from n, which is 2, to 128"), (129, "to 128")):
        with pytest.raises(UserError, match=f"best_of={best_of} is not allowed: .*{message}"):
            ask(prompt="x", n=2, best_of=best_of)
    body = text.body_type(prompt="x", best_of=3, stream=True)
    with pytest.raises(UserError, match=r"best_of=3 .* with stream=true: which are the best"):
        text.requests(0, body)
    text.requests(0, text.body_type(prompt="x", n=3, best_of=3, stream=True))


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("echo", [False, True])
def test_prompt_logprobs_are_those_of_the_model(ask, logprobs_of, code_tokenizer, count, echo):
    answer = ask(prompt=PROMPT, prompt_logprobs=count, echo=echo, logprobs=1)
    (choice,) = answer["choices"]
    first, *found = choice["prompt_logprobs"]
    check_prompt_logprobs(found, logprobs_of(PROMPT), PROMPT, count, code_tokenizer)
    assert first is None
    assert {len(top) for top in choice["logprobs"]["top_logprobs"] if top} <= {1, 2}
    length = len(PROMPT) if echo else 0
    assert len(choice["logprobs"]["tokens"]) == length + SETTINGS["max_tokens"]


def test_a_chat_has_the_prompt_logprobs_in_the_answer(ask, logprobs_of, code_tokenizer):
    answer = ask(messages=HI, prompt_logprobs=2, n=2)
    tokens = code_tokenizer.encode_prompt("user: def f(x)\n\nassistant:")
    first, *found = answer["prompt_logprobs"]
    assert first is None
    check_prompt_logprobs(found, logprobs_of(tokens), tokens, 2, code_tokenizer)
    assert all("prompt_logprobs" not in choice for choice in answer["choices"])
    assert "prompt_logprobs" not in ask(messages=HI)


def check_prompt_logprobs(found, expected, tokens, count, tokenizer):
    assert len(found) == len(tokens) - 1
    for entries, row, token in zip(found, expected, tokens[1:], strict=False):
        ranked = sorted(range(len(row)), key=lambda at: (-row[at].item(), at))
        assert list(entries) == list(dict.fromkeys(map(str, [token, *ranked[:count]])))
        for name, entry in entries.items():
            assert entry["logprob"] == pytest.approx(row[int(name)].item(), abs=2e-5)
            assert entry["rank"] == ranked.index(int(name)) + 1
            assert entry["decoded_token"] == tokenizer.token_text(int(name))


def test_prompt_logprobs_that_cannot_be_had_are_refused(ask, endpoints):
    text, _ = endpoints
    for count in (-1, 21):
        with pytest.raises(UserError, match=f"prompt_logprobs={count} .* from 0 to 20"):
            ask(prompt="x", prompt_logprobs=count, logprobs=3, echo=True)
    with pytest.raises(UserError, match="prompt_logprobs=1 is not allowed: it needs stream=false"):
        text.requests(0, text.body_type(prompt="x", prompt_logprobs=1, stream=True))


@pytest.mark.parametrize("count", [1, 4, 6, 50])
def test_truncation_keeps_the_last_tokens(ask, logprobs_of, code_tokenizer, count):
    kept = PROMPT[-count:]
    expected = ask(prompt=kept, echo=True, logprobs=1)
    assert ask(prompt=PROMPT, truncate_prompt_tokens=count, echo=True, logprobs=1) == expected
    tokens = code_tokenizer.encode_prompt("größe = f(x)")
    by_ids = ask(prompt=tokens[-count:], echo=True)
    by_text = ask(prompt="größe = f(x)", truncate_prompt_tokens=count, echo=True)
    assert by_text == by_ids
    assert by_text["usage"]["prompt_tokens"] == min(count, len(tokens))


def test_echo_of_a_truncated_text_has_the_tokens_that_are_left(ask, code_tokenizer):
    """BOS is shown nowhere, whether it is left or not."""
    num_tokens = len(code_tokenizer.encode("def f(x)"))
    for count, num_shown in ((num_tokens + 1, num_tokens), (num_tokens, num_tokens), (2, 2)):
        settings = {"truncate_prompt_tokens": count, "echo": True, "logprobs": 0, "max_tokens": 0}
        (choice,) = ask(prompt="def f(x)", **settings)["choices"]
        logprobs = choice["logprobs"]
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert len(logprobs["tokens"]) == num_shown
        assert (logprobs["token_logprobs"][0] is None) == (count <= num_tokens)


def test_truncation_to_what_fits(ask):
    """-1 leaves room for the new tokens. In a chat without a limit they are the default, or what
    there is room for after a prompt that fits."""
    long = [5] * 100
    answer = ask(prompt=long, truncate_prompt_tokens=-1)
    assert answer == ask(prompt=long[-56:])
    chat = {"messages": [{"role": "user", "content": "x" * 100}], "truncate_prompt_tokens": -1}
    assert ask(**chat)["usage"]["prompt_tokens"] == 56
    usage = ask(**chat, max_tokens=None)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (55, 9)
    fitting = {**chat, "messages": [{"role": "user", "content": "x" * 40}], "max_tokens": None}
    usage = ask(**fitting)["usage"]
    assert usage == ask(**{**fitting, "truncate_prompt_tokens": None})["usage"]
    assert 55 < usage["prompt_tokens"] < 64
    assert ask(**{**chat, "truncate_prompt_tokens": 60}, max_tokens=None)["usage"] == {
        "prompt_tokens": 60,
        "completion_tokens": 4,
        "total_tokens": 64,
    }
    for count in (0, -2):
        with pytest.raises(UserError, match=f"truncate_prompt_tokens={count} .* number >= 1 and"):
            ask(prompt=long, truncate_prompt_tokens=count)
    with pytest.raises(UserError, match="maximum context length"):
        ask(prompt=long, truncate_prompt_tokens=60)


def test_special_tokens_have_no_text_unless_it_is_asked_for(ask):
    bos_and_eos = {"prompt": "x", "logit_bias": {"1": 100, "2": 99.0}, "temperature": 2.0}
    (plain,) = ask(**bos_and_eos, logprobs=0)["choices"]
    names = "".join(plain["logprobs"]["tokens"])
    assert {"<s>", "</s>"} == {*plain["logprobs"]["tokens"]}
    assert plain["text"] == ""
    (shown,) = ask(**bos_and_eos, skip_special_tokens=False, logprobs=0)["choices"]
    assert shown["text"] == names
    starts = [*shown["logprobs"]["text_offset"], len(names)]
    parts = [names[start:end] for start, end in pairwise(starts)]
    assert parts == shown["logprobs"]["tokens"]
    stopped = ask(**bos_and_eos, skip_special_tokens=False, stop="</s>")["choices"]
    assert stopped[0]["text"] == names.partition("</s>")[0]
    ended = ask(prompt="x", skip_special_tokens=False, **{**LIKELY_EOS, "logit_bias": {"2": 100}})
    assert (ended["choices"][0]["text"], ended["choices"][0]["finish_reason"]) == ("", "stop")


def test_no_end_comes_before_min_tokens(ask):
    eos = {**LIKELY_EOS, "logit_bias": {"2": 100}, "prompt": "x", "logprobs": 0}
    for least in (0, 5):
        answer = ask(**eos, min_tokens=least)
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == least
        assert choice["logprobs"]["tokens"].index("</s>") == least


@pytest.mark.parametrize("more", [{}, {"n": 2}, {"best_of": 3}, {"stop_token_ids": [100]}])
def test_the_token_that_ends_a_text_has_log_probabilities(ask, logprobs_of, code_tokenizer, more):
    """lm-eval takes the last entry for that of the one generated token."""
    stop = more.get("stop_token_ids", [EOS])[0]
    lm_eval = {"prompt": [PROMPT], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    answer = ask(**lm_eval, **LIKELY_EOS | {"logit_bias": {str(stop): 100}}, **more)
    assert answer["usage"]["completion_tokens"] == 0
    rows = logprobs_of(PROMPT)
    expected = [row[token].item() for row, token in zip(rows, [*PROMPT[1:], stop], strict=True)]
    for choice in answer["choices"]:
        logprobs = choice["logprobs"]
        assert choice["text"] == code_tokenizer.decode(PROMPT)
        assert {len(values) for values in logprobs.values()} == {len(PROMPT) + 1}
        assert logprobs["token_logprobs"][1:] == pytest.approx(expected, abs=2e-5)
        assert logprobs["tokens"][-1] == code_tokenizer.token_text(stop)
        assert logprobs["text_offset"][-1] == len(choice["text"])
