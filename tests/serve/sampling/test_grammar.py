"""Completions constrained by a JSON schema or a regular expression."""

import json
import re
import subprocess
import threading
from dataclasses import replace
from itertools import count

import pytest

from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.sampling.grammar import MOST_CHARS, Grammars
from serve.sampling_params import Constraint, SamplingParams
from serve.wire import request_to_wire
from stu.common.errors import UserError
from tests import forked
from tests.serve.requests import decode, make_request
from tests.serve.server_process import SECONDS

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
REGEX = "(ab|xé)+[0-9]{2}"
CONSTRAINTS = {
    "schema": Constraint("json_schema", json.dumps(SCHEMA)),
    "regex": Constraint("regex", REGEX),
}


@pytest.mark.parametrize("temperature", [0, 1, 5])
def test_completions_follow_their_constraints(code_model, code_tokenizer, temperature):
    """Requests without a constraint get the same tokens as in a batch of their own."""
    bos = code_tokenizer.bos_id
    sampling = [SamplingParams(temperature=temperature, seed=seed) for seed in range(8)]
    free = [make_request([bos], 50, params) for params in sampling[:2]]
    constrained = [
        make_request([bos], 60, params, stop_at_eos=True, constraint=constraint)
        for params in sampling
        for constraint in CONSTRAINTS.values()
    ]
    alone = decode(code_model, code_tokenizer, free)
    answers = decode(code_model, code_tokenizer, [*free, *constrained])
    assert answers[:2] == alone
    for request, answer in zip(constrained, answers[2:], strict=True):
        if request.sampling.constraint.kind == "json_schema":
            assert answer.finish_reason == "stop"
            assert set(json.loads(answer.text)) == {"n", "ok"}
        elif answer.finish_reason == "stop":  # the expression allows texts of any length
            assert re.fullmatch(REGEX, answer.text)


def test_constraint_continues_in_another_engine(code_model, code_tokenizer):
    sampling = SamplingParams(temperature=1.0, seed=5)
    constraint = CONSTRAINTS["regex"]
    request = make_request([1], 60, sampling, stop_at_eos=True, constraint=constraint)
    (whole,) = decode(code_model, code_tokenizer, [request], batch_invariant=True)
    tokens = whole.token_ids[:3]
    (rest,) = decode(code_model, code_tokenizer, [replace(request, new_token_ids=tokens)])
    head = b"".join(map(code_tokenizer.token_bytes, tokens)).decode(errors="ignore")
    assert rest.finish_reason == "stop"
    assert re.fullmatch(REGEX, head + rest.text)


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
def test_wrong_constraints_are_refused(code_tokenizer, kind, source, message):
    with pytest.raises(UserError, match=message):
        Grammars(code_tokenizer).check(Constraint(kind, source))


def test_constraint_needs_eos():
    with pytest.raises(
        UserError, match="stop_at_eos=false is not allowed: it must be true with a constraint"
    ):
        make_request([1], 5, constraint=CONSTRAINTS["regex"])


def test_too_costly_constraint_ends_its_request_only(code_model, code_tokenizer):
    """An object may have any of 256 sets of properties, which costs too much where it begins."""
    properties = [[{"properties": {f"{at}{letter}": {}}} for letter in "ab"] for at in range(8)]
    schema = {"type": "object", "allOf": [{"anyOf": options} for options in properties]}
    costly = Constraint("json_schema", json.dumps(schema))
    with pytest.raises(UserError, match=r"json_schema is not allowed: .* items; max is"):
        Grammars(code_tokenizer).check(costly)
    requests = [make_request([1], 9), make_request([1], 9, stop_at_eos=True, constraint=costly)]
    engine = Engine(code_model, code_tokenizer, EngineConfig(cache_gib=0.01))
    for request in requests:
        engine.add(request)
    last = {}
    while engine.has_work:
        last |= {output.request_id: output for output in engine.step()}
    assert (last[0].finish_reason, last[0].is_refused) == ("length", False)
    assert (last[1].finish_reason, last[1].is_refused) == ("error", True)
    assert last[1].error.startswith("json_schema cannot be followed beyond 1 tokens")


def test_matchers_share_the_compiled_constraint_and_not_the_position(code_tokenizer):
    grammars = Grammars(code_tokenizer)
    grammars.check(CONSTRAINTS["schema"])
    first, second = (grammars.matcher(CONSTRAINTS["schema"]) for _ in range(2))
    at_start = second.allowed(code_tokenizer.vocab_size)
    first.append(int(at_start.nonzero()[0, 0]))
    assert not first.allowed(code_tokenizer.vocab_size).equal(at_start)
    for matcher in (second, grammars.matcher(CONSTRAINTS["schema"])):
        assert matcher.allowed(code_tokenizer.vocab_size).equal(at_start)
    assert grammars._compiled.cache_info().misses == 1


def test_other_requests_advance_while_a_constraint_is_compiled(replica, monkeypatch):
    send, receive = replica
    may_compile, compile_constraint = threading.Event(), Engine.compile

    def compile_later(engine, constraint):
        assert may_compile.wait(SECONDS)
        compile_constraint(engine, constraint)

    monkeypatch.setattr(Engine, "compile", compile_later)
    try:
        for number in (1, 2):
            request = make_request([1], 60, stop_at_eos=True, constraint=CONSTRAINTS["schema"])
            send({"add": number, "request": request_to_wire(request)})
        send({"add": 3, "request": request_to_wire(make_request([1], 5))})
        send({"abort": 2})
        outputs = (output for _ in count() for output in receive("outputs")["outputs"])
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


def chain(link, end, count):
    """Return rules of a grammar, or definitions of a schema, each of which leads to the next."""
    return [link.format(i=i, next=i + 1) for i in range(count)] + [end.format(i=count)]


def schema_chain(link, count):
    definitions = ",".join(chain(link, '"{i}":{{"type":"null"}}', count))
    return '{"$ref":"#/$defs/0","$defs":{' + definitions + "}}"


ITEMS = '"{i}":{{"items":{{"$ref":"#/$defs/{next}"}}}}'
PROPERTIES = '"{i}":{{"properties":{{"a":{{"$ref":"#/$defs/{next}"}}}}}}'
LONG_CHAINS = [
    ("grammar", "\n".join(["start: r0", *chain("r{i}: r{next}", 'r{i}: "a"', 5000)])),
    ("grammar", "\n".join(["start: r0", *chain('r{i}: "x" r{next}', 'r{i}: "a"', 3500)])),
    ("grammar", "\n".join(["start: r0", *chain('r{i}: "x" | r{next}', 'r{i}: "a"', 3000)])),
    ("grammar", "start: %json " + schema_chain(ITEMS, 1500)),
    ("json_schema", schema_chain(ITEMS, 1500)),
    ("json_schema", schema_chain(PROPERTIES, 1150)),
]
CHECK = """
import json, sys
from pathlib import Path
from serve.sampling.grammar import Grammars
from serve.sampling_params import Constraint
from stu.common.errors import UserError
from stu.tokenizer import read_tokenizer

grammars = Grammars(read_tokenizer(Path(sys.argv[1])))
for kind, source in json.load(sys.stdin):
    try:
        grammars.check(Constraint(kind, source))
        print("allowed")
    except UserError as error:
        print(" ".join(str(error).split())[:100])
"""


def test_long_chains_of_rules_and_references_end_no_process(code_tokenizer, tmp_path):
    """The library recurses along them, and a usual stack is too small for what is allowed."""
    assert all(len(source) <= MOST_CHARS for _, source in LONG_CHAINS)
    code_tokenizer.save(tmp_path)
    done = subprocess.run(
        [forked.python(), "-c", CHECK, str(tmp_path)],
        input=json.dumps(LONG_CHAINS),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(LONG_CHAINS)
    assert done.stdout.splitlines()[:2] == ["allowed"] * 2


def test_without_room_for_a_large_stack_only_short_constraints_are_compiled(
    code_tokenizer, monkeypatch
):
    def fail(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    usual, grammars = threading.stack_size(), Grammars(code_tokenizer)
    assert grammars.matcher(CONSTRAINTS["regex"]).num_allowed(code_tokenizer.encode("ab")) >= 1
    with pytest.raises(UserError, match="too long for the address space"):
        grammars.matcher(Constraint(*LONG_CHAINS[0]))
    assert threading.stack_size() == usual


NAMES = {"type": "object", "properties": {"a": {}}}


@pytest.mark.parametrize(
    "schema",
    [
        {**NAMES, "required": [["a"]]},
        {**NAMES, "required": [{"n": 1}]},
        {"type": "object", "propertyNames": {"pattern": ["x"]}},
        {"type": "object", "propertyNames": {"pattern": None}},
        {"type": "object", "propertyNames": {"format": ["x"]}},
        {"anyOf": [{"$ref": f"#/anyOf/{5000 * '9'}"}]},
    ],
)
def test_malformed_schemas_are_refused(code_tokenizer, schema):
    with pytest.raises(UserError, match="json_schema is not allowed"):
        Grammars(code_tokenizer).check(Constraint("json_schema", json.dumps(schema)))
