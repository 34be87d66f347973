"""Completions that must follow a schema or an expression, by a model that knows of neither."""

import gc
import json
import re
import socket
import threading
from contextlib import suppress
from dataclasses import replace

import pytest

from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.sampling.grammar import MOST_CHARS, Grammars
from serve.sampling_params import Constraint, SamplingParams
from serve.server.replicas.process import Replica
from serve.server.replicas.wire import Unpacker, pack, request_to_wire
from stu.common.errors import UserError
from tests.serve.requests import make_request
from tests.serve.server_process import SECONDS

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
CONSTRAINTS = {
    "schema": Constraint("json_schema", json.dumps(SCHEMA)),
    "regex": Constraint("regex", "(ab|xé)+[0-9]{2}"),
}


def decode(model, tokenizer, requests):
    engine = Engine(model, tokenizer, EngineConfig(cache_gib=0.01, page_len=4))
    texts = {engine.add(request): ["", None] for request in requests}
    while engine.has_work:
        for its in engine.step():
            texts[its.request_id][0] += its.text
            texts[its.request_id][1] = its.finish_reason
    return list(texts.values())


@pytest.mark.parametrize("temperature", [0, 1, 5])
def test_completions_follow_their_constraints(code_model, code_tokenizer, temperature):
    """Each its own, among requests without any, whose tokens stay what they are."""
    bos = code_tokenizer.bos_id
    sampling = [SamplingParams(temperature=temperature, seed=seed) for seed in range(8)]
    free = [make_request([bos], 50, its) for its in sampling[:2]]
    constrained = [
        make_request([bos], 60, its, stop_at_eos=True, constraint=constraint)
        for its in sampling
        for constraint in CONSTRAINTS.values()
    ]
    alone = decode(code_model, code_tokenizer, free)
    answers = decode(code_model, code_tokenizer, [*free, *constrained])
    assert answers[:2] == alone
    for request, (text, reason) in zip(constrained, answers[2:], strict=True):
        if request.sampling.constraint.kind == "json_schema":
            assert reason == "stop"
            assert set(json.loads(text)) == {"n", "ok"}
        elif reason == "stop":  # it may go on without end
            assert re.fullmatch("(ab|xé)+[0-9]{2}", text)


def test_a_constraint_goes_on_in_another_engine(code_model, code_tokenizer):
    request = make_request(
        [1],
        60,
        SamplingParams(temperature=1.0, seed=5),
        stop_at_eos=True,
        constraint=CONSTRAINTS["regex"],
    )
    engine = Engine(code_model, code_tokenizer, EngineConfig(cache_gib=0.01, batch_invariant=True))
    engine.add(request)
    tokens = [token for _ in range(4) for its in engine.step() for token in its.new_token_ids]
    going_on = replace(request, new_token_ids=tokens[:3])
    ((rest, reason),) = decode(code_model, code_tokenizer, [going_on])
    head = b"".join(map(code_tokenizer.token_bytes, tokens[:3])).decode(errors="ignore")
    assert reason == "stop"
    assert re.fullmatch("(ab|xé)+[0-9]{2}", head + rest)


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("regex", "(a", "unclosed group"),
        ("regex", "a" * (MOST_CHARS + 1), "it has 65537 characters and may have 65536"),
        ("json_schema", "{", "json_schema is not allowed"),
        ("json_schema", "[1]", "must be an object or boolean"),
        ("json_schema", '{"type": "nope"}', "nope"),
        ("json_schema", '{"$ref": "http://localhost/schema"}', "does not fetch"),
        ("json_schema", "[" * 20_000, "nested too deeply"),
        ("regex", "\ud800", "half of a surrogate pair"),
    ],
)
def test_constraints_that_are_not_allowed(code_tokenizer, kind, source, message):
    with pytest.raises(UserError, match=message):
        Grammars(code_tokenizer).check(Constraint(kind, source))


def test_a_constraint_needs_eos():
    with pytest.raises(
        UserError, match="stop_at_eos=false is not allowed: it must be true with a constraint"
    ):
        make_request([1], 5, constraint=CONSTRAINTS["regex"])


def test_a_constraint_that_takes_too_much_work_ends_its_request_alone(code_model, code_tokenizer):
    """Its every object has one of 256 sets of properties; what it takes shows when one begins."""
    properties = [[{"properties": {f"{at}{its}": {}}} for its in "ab"] for at in range(8)]
    schema = {"type": "object", "allOf": [{"anyOf": options} for options in properties]}
    costly = Constraint("json_schema", json.dumps(schema))
    with pytest.raises(UserError, match=r"json_schema is not allowed: .* items; max is"):
        Grammars(code_tokenizer).check(costly)
    engine = Engine(code_model, code_tokenizer, EngineConfig(cache_gib=0.01))
    other = engine.add(make_request([1], 9))
    request_id = engine.add(make_request([1], 9, stop_at_eos=True, constraint=costly))
    last = {}
    while engine.has_work:
        last |= {its.request_id: its for its in engine.step()}
    assert (last[other].finish_reason, last[other].is_refused) == ("length", False)
    assert (last[request_id].finish_reason, last[request_id].is_refused) == ("error", True)
    assert last[request_id].error.startswith("json_schema cannot be followed beyond 1 tokens")


def test_completions_share_a_compiled_constraint_and_not_their_place_in_it(code_tokenizer):
    grammars = Grammars(code_tokenizer)
    grammars.check(CONSTRAINTS["schema"])
    one, other = (grammars.matcher(CONSTRAINTS["schema"]) for _ in range(2))
    at_first = other.allowed(code_tokenizer.vocab_size)
    one.append(int(at_first.nonzero()[0, 0]))
    assert not one.allowed(code_tokenizer.vocab_size).equal(at_first)
    for its in (other, grammars.matcher(CONSTRAINTS["schema"])):
        assert its.allowed(code_tokenizer.vocab_size).equal(at_first)
    assert grammars._compiled.cache_info().misses == 1


def test_others_go_on_while_an_engine_compiles_a_constraint(
    model_directory, monkeypatch, code_tokenizer
):
    may_compile = threading.Event()
    compile_constraint = Engine.compile

    def compile_later(engine, constraint):
        assert may_compile.wait(SECONDS)
        compile_constraint(engine, constraint)

    monkeypatch.setattr(Engine, "compile", compile_later)
    schema = CONSTRAINTS["schema"]
    server, connection = socket.socketpair()
    server.settimeout(SECONDS)

    def run():
        with suppress(SystemExit, ConnectionError):  # it ends with the server
            Replica(connection).run()

    replica = threading.Thread(target=run)
    replica.start()
    unpacker = Unpacker()

    def messages():
        while data := server.recv(2**20):
            yield from unpacker.feed(data)

    try:
        engine = {"cache_gib": 0.01}
        settings = {"model": str(model_directory), "device": "cpu", "dtype": "float32"}
        server.sendall(pack({**settings, "engine": engine}))
        heard = messages()
        assert "ready" in next(heard)
        for number in (1, 2):
            request = make_request([1], 60, stop_at_eos=True, constraint=schema)
            server.sendall(pack({"add": number, "request": request_to_wire(request)}))
        server.sendall(pack({"add": 3, "request": request_to_wire(make_request([1], 5))}))
        server.sendall(pack({"abort": 2}))
        outputs = (output for message in heard for output in message["outputs"])
        for output in outputs:
            assert output["request_id"] == 3
            if "finish_reason" in output:
                break
        may_compile.set()
        text = ""
        for output in outputs:
            assert output["request_id"] == 1, "the second was aborted"
            text += output["text"]
            if "finish_reason" in output:
                break
        assert set(json.loads(text)) == {"n", "ok"}
    finally:
        may_compile.set()
        server.close()
        replica.join()
        connection.close()
        gc.unfreeze()
