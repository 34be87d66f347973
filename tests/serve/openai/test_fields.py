"""Fields that clients send: they change nothing, work, or are refused by name."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_completion_create_params

from serve.openai import fields
from serve.openai.chat import ChatCompletions
from serve.openai.completions import TextCompletions
from serve.openai.embeddings import Embeddings
from serve.openai.responses.body import ResponseBody
from serve.openai.responses.items import Item
from serve.openai.schemas import (
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    RequestBody,
    read_body,
)
from serve.prompts import RequestBuilder
from serve.server.batches.batch_routes import BatchBody
from stu.chat.template import ChatTemplate
from stu.common.errors import UserError

USER = {"role": "user", "content": "hi"}
TEXT = {"prompt": "hi", "max_tokens": 4, "temperature": 0.5}
CHAT = {"messages": [USER], "max_tokens": 4, "temperature": 0.5}
HARMLESS = {"user": "someone", "safety_identifier": "a", "metadata": {"a": "b"}, "store": True}
HARMLESS |= {"service_tier": "flex", "parallel_tool_calls": False, "prompt_cache_key": "a"}
HARMLESS |= {"prediction": {"type": "content", "content": "x"}, "prompt_cache_retention": "24h"}
HARMLESS |= {"prompt_cache_options": {}, "session_id": "a"}
HARMLESS |= {"include_reasoning": False, "spaces_between_special_tokens": False}
HARMLESS |= {"guided_decoding_backend": "auto"}
AS_OTHERS = [
    ({"seed": -1}, {}),
    ({"top_k": -1}, {"top_k": 0}),
    ({"top_k": -1}, {}),
    ({"ignore_eos": True}, {"stop_at_eos": False}),
    ({"ignore_eos": False}, {}),
    ({"ignore_eos": True, "stop_at_eos": False}, {"ignore_eos": True}),
    ({"seed": -2}, {"seed": 2**64 - 2}),
    ({"stop": []}, {}),
    ({"stop_token_ids": []}, {}),
    ({"min_tokens": 0}, {}),
    ({"priority": 0}, {}),
    ({"logit_bias": {}}, {}),
]
"""Pairs of settings with the same meaning."""


@pytest.fixture(scope="module")
def endpoints(code_tokenizer):
    """Text and chat completions, each with a body."""
    common = {
        "builder": RequestBuilder(code_tokenizer, {"seed": 3, "max_new_tokens": 9}),
        "tokenizer": code_tokenizer,
        "model_name": "demo",
        "max_seq_len": 64,
    }
    template = ChatTemplate(Path("nothing"), code_tokenizer)
    chats = ChatCompletions(template, 9, **common)
    return {"chat": (chats, CHAT), "text": (TextCompletions(**common), TEXT)}


@pytest.fixture(params=["text", "chat"])
def endpoint(request, endpoints):
    """Kind of an endpoint, and a function from more fields of its body to requests."""
    completions, body = endpoints[request.param]

    def requests(**fields):
        return completions.requests(7, read_body(completions.body_type, {**body, **fields}))

    return request.param, requests


def test_harmless_fields_change_nothing(endpoint):
    _, requests = endpoint
    assert HARMLESS.keys() == fields.HARMLESS.keys()
    for name, value in HARMLESS.items():
        assert requests(**{name: value}) == requests(), name
    assert requests(**HARMLESS) == requests()
    for name in HARMLESS:
        with pytest.raises(UserError, match=f"{name}=5 is not allowed: it must be"):
            requests(**{name: 5})


def test_neutral_values_change_nothing_and_others_are_refused_by_name(endpoint):
    name, requests = endpoint
    neutral = fields.CHAT_NEUTRAL if name == "chat" else fields.TEXT_NEUTRAL
    for field, (values, fix) in neutral.items():
        for value in values:
            assert requests(**{field: value}) == requests(), field
        allowed = {(type(value), str(value)) for value in values}
        for value in ([7], {"a": 1}, "other", 7, 0.5, 0, 1, True, False, "", [], {}):
            if (type(value), str(value)) in allowed:
                continue
            with pytest.raises(UserError, match=f"{field}=.* is not allowed: ") as found:
                requests(**{field: value})
            assert fix in str(found.value)


def test_null_means_the_same_as_leaving_out(endpoint):
    name, requests = endpoint
    known = {*fields.HARMLESS, *fields.CHAT_NEUTRAL, *fields.TEXT_NEUTRAL, "never_heard_of"}
    known |= {*ChatBody.model_fields, *CompletionBody.model_fields}
    asked = CHAT if name == "chat" else TEXT
    for field in known - asked.keys():
        assert requests(**{field: None}) == requests(), field


@pytest.mark.parametrize(("settings", "others"), AS_OTHERS)
def test_settings_that_mean_the_same(endpoint, settings, others):
    _, requests = endpoint
    assert requests(**settings) == requests(**others)


def test_negative_seeds_are_seeds(endpoint):
    _, requests = endpoint
    assert len({requests(seed=seed)[0].sampling.seed for seed in (-2, -3, -(2**63), 2)}) == 4
    (request,), (plain,) = requests(seed=-2), requests()
    assert replace(request, sampling=plain.sampling) == plain


def test_defaults_of_known_clients_change_nothing(endpoint):
    name, requests = endpoint
    litellm = {"n": 1, "stream": False, "store": False, "metadata": {}, "service_tier": "auto"}
    vllm = {"use_beam_search": False, "length_penalty": 1.0, "include_stop_str_in_output": False}
    vllm |= {"skip_special_tokens": True, "spaces_between_special_tokens": True, "priority": 0}
    vllm |= {"stop_token_ids": [], "min_tokens": 0, "ignore_eos": False, "logit_bias": None}
    openai = {"tools": [], "modalities": ["text"], "tool_choice": "none", "function_call": "auto"}
    openai |= {"presence_penalty": 0, "frequency_penalty": 0, "top_p": 1, "logit_bias": {}}
    if name == "chat":
        openai |= {"logprobs": False, "top_logprobs": 0, "reasoning_effort": "none"}
        vllm |= {"add_generation_prompt": True, "continue_final_message": False}
        vllm |= {"add_special_tokens": False, "chat_template_kwargs": {}, "documents": []}
    else:
        openai |= {"best_of": 1, "suffix": "", "echo": False}
        vllm |= {"add_special_tokens": True}
    for body in (litellm, vllm, openai):
        assert requests(**body) == requests()


@pytest.mark.parametrize(
    ("params", "body", "neutral"),
    [
        (
            completion_create_params.CompletionCreateParamsBase,
            CompletionBody,
            fields.TEXT_NEUTRAL,
        ),
        (
            chat_completion_create_params.CompletionCreateParamsBase,
            ChatBody,
            fields.CHAT_NEUTRAL,
        ),
        (embedding_create_params.EmbeddingCreateParams, EmbeddingBody, fields.EMBEDDING_NEUTRAL),
    ],
)
def test_every_parameter_of_openai_s_client_is_known(params, body, neutral):
    """A new parameter of a newer client fails here, until somebody decides about it."""
    sent = params.__annotations__.keys()
    assert sent - {*body.model_fields, *fields.HARMLESS, *neutral} == set()


def test_stop_tokens_and_min_tokens(endpoint, code_tokenizer):
    _, requests = endpoint
    (request,) = requests(stop_token_ids=[5, 9], min_tokens=3)
    assert request.sampling.stop_ids(code_tokenizer.eos_id) == (code_tokenizer.eos_id, 5, 9)
    assert request.sampling.min_new_tokens == 3
    (request,) = requests(stop_token_ids=[5], ignore_eos=True)
    assert request.sampling.stop_ids(code_tokenizer.eos_id) == (5,)


def test_priorities(endpoint):
    _, requests = endpoint
    (request,), (plain,) = requests(priority=7), requests()
    assert request == replace(plain, priority=7)
    for number in (-1, 2**31):
        with pytest.raises(UserError, match=r"priority=.* from 0, which goes first"):
            requests(priority=number)


def test_many_stop_strings(endpoint):
    _, requests = endpoint
    stops = [f"\n{number}" for number in range(128)]
    assert requests(stop=stops)[0].sampling.stop == tuple(stops)


def test_the_documentation_names_every_field():
    text = (Path(__file__).parents[3] / "docs" / "http-api.md").read_text(encoding="utf-8")
    for name in {*fields.HARMLESS, *fields.CHAT_NEUTRAL, *fields.TEXT_NEUTRAL}:
        assert f"`{name}`" in text, name


def test_validation_of_any_body_stops_at_the_first_error():
    """Otherwise pydantic builds an error for each of a million wrong elements."""
    bodies, left = [RequestBody, ResponseBody, BatchBody, *Item.__subclasses__()], []
    while bodies:
        body = bodies.pop()
        bodies += body.__subclasses__()
        left.append((body.__name__, body.__pydantic_core_schema__))
    seen = set()
    while left:
        name, part = left.pop()
        if isinstance(part, dict):
            kind = part.get("type")
            elements = part.get("items_schema" if kind == "list" else "values_schema", {})
            if kind in ("list", "dict") and elements.get("type", "any") != "any":
                assert part.get("fail_fast"), f"{name}: {part}"
                seen.add(kind)
            name = part.get("cls", name) if kind == "model" else name
            left += [(name, value) for value in part.values()]
        elif isinstance(part, list | tuple):
            left += [(name, value) for value in part]
    assert seen == {"list", "dict"}


def test_parts_and_calls_of_all_messages_together_are_few():
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "5"}}
    for name, element, most in (("content", 5, 8192), ("tool_calls", call, 1024)):
        messages = 64 * [{"role": "assistant", name: 200 * [element]}]
        for many in (messages, 20 * messages):
            with pytest.raises(UserError, match=f"messages of at most {most} ") as found:
                read_body(ChatBody, {"messages": many})
            assert found.value.field == "messages"


def test_errors_name_the_limit_of_new_tokens_that_was_sent(endpoints):
    chats, _ = endpoints["chat"]
    for names in (
        ["max_tokens"],
        ["max_completion_tokens"],
        ["max_tokens", "max_completion_tokens"],
    ):
        body = read_body(ChatBody, {"messages": [USER], **dict.fromkeys(names, -1)})
        with pytest.raises(UserError, match=f"^{names[0]}=-1 is not allowed") as found:
            chats.requests(0, body)
        assert found.value.field == names[0]


def test_a_message_may_say_that_it_is_one(endpoints):
    chats, _ = endpoints["chat"]
    plain = chats.requests(0, read_body(ChatBody, CHAT))
    for kind in ("text", "message"):
        asked = {**CHAT, "messages": [{**USER, "type": kind}]}
        assert chats.requests(0, read_body(ChatBody, asked)) == plain
    with pytest.raises(UserError, match=r'messages.0.type="image" is not allowed: leave it out'):
        read_body(ChatBody, {"messages": [{**USER, "type": "image"}]})


@pytest.mark.parametrize(
    ("part", "field", "message"),
    [
        ({"text": "a", "id": "x"}, ".1.id", "there is no such field"),
        ({}, ".1.text", 'text" is missing'),
        ({"text": 5}, ".1.text", "text=5 is not allowed: it must be a string"),
        ({"text": "a", "cache_control": "x"}, ".1.cache_control", "it must be an object"),
        ({"text": "a", "annotations": 5}, ".1.annotations", "it must be a list"),
        ("a", ".1", '="a" is not allowed: it must be an object'),
        ({"text": "a", "annotations": [], "cache_control": {}}, None, ""),
    ],
)
def test_errors_within_a_part_name_its_field(part, field, message):
    for kind, body, place in (
        (ChatBody, "messages", "messages.0.content"),
        (ResponseBody, "input", "input.0.content"),
    ):
        name = "text" if kind is ChatBody else "input_text"
        own = {"type": name, **part} if isinstance(part, dict) else part
        asked = {body: [{"role": "user", "content": [{"type": name, "text": "a"}, own]}]}
        if field is None:
            read_body(kind, asked)
            continue
        with pytest.raises(UserError, match=re.escape(message)) as found:
            read_body(kind, asked)
        assert found.value.field == place + field
    with pytest.raises(UserError, match=r'logit_bias.content="a" .* it must be a number'):
        read_body(ChatBody, {**CHAT, "logit_bias": {"content": "a"}})


def test_embeddings_have_the_salt_of_their_tenant(code_tokenizer):
    common = {"tokenizer": code_tokenizer, "model_name": "demo", "max_seq_len": 64}
    embeddings = Embeddings(16, **common)
    (request,) = embeddings.requests(0, read_body(EmbeddingBody, {"input": "x", "priority": 3}))
    assert request.priority == 3
    for more, salt in (({"cache_salt": "a"}, "a"), ({}, ""), ({"cache_salt": None}, "")):
        body = read_body(EmbeddingBody, {"input": ["x", [5]], **more})
        assert [request.cache_salt for request in embeddings.requests(0, body)] == [salt, salt]
