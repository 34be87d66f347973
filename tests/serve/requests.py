"""Requests of tests, and their completions."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from serve.completion import Completion, CompletionBuilder
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.request import Request
from serve.sampling_params import SamplingParams
from stu.model import FlashSTU
from stu.tokenizer import Tokenizer

REQUEST_FIELDS = {field.name for field in fields(Request)}
GREEDY = SamplingParams()


def make_request(
    prompt: Sequence[int], max_new_tokens: int, sampling: SamplingParams = GREEDY, **values: Any
) -> Request:
    """Return a request that EOS does not end; `values`: fields of Request and SamplingParams."""
    own = {name: values.pop(name) for name in REQUEST_FIELDS & values.keys()}
    settings = {"max_new_tokens": max_new_tokens, "stop_at_eos": False, **values}
    return Request(prompt, replace(sampling, **settings), **own)


def decode(
    model: FlashSTU, tokenizer: Tokenizer, requests: Sequence[Request], **config: Any
) -> list[Completion]:
    """Return the completions of `requests`; `config`: fields of EngineConfig."""
    engine = Engine(model, tokenizer, EngineConfig(**{"cache_gib": 0.01, **config}))
    builders = {engine.add(request): CompletionBuilder() for request in requests}
    while engine.has_work:
        for output in engine.step():
            builders[output.request_id].add(output)
        engine.check_integrity()
    return [builder.completion() for builder in builders.values()]
