"""`stu-generate` on OpenAI's batch format."""

import io
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from serve import LLM
from serve.batch.openai_rows import OpenAiRows
from serve.batch.rows import Refusal
from serve.completion import Completion
from serve.openai.choices import TextChoiceWriter
from serve.openai.completions import TextCompletions
from serve.prompts import RequestBuilder
from serve.request import TokenLogprobs
from serve.sampling.detokenizer import TextStream
from serve.sampling_params import SamplingParams
from stu.tokenizers.hugging_face import HuggingFaceTokenizer
from stu.tokenizers.sentence_piece import SentencePieceTokenizer
from tests.serve.conftest import generate, read_rows, write_rows
from tests.serve.requests import make_request

NO_EOS = {"stop_at_eos": False}
REQUEST = make_request([1, 100, 101], 20, SamplingParams(logprobs=1))


def row(custom_id, **body):
    body = {"model": "demo", **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def chat(custom_id, messages, **body):
    body = {"model": "demo", "messages": messages, **body}
    return {**row(custom_id), "url": "/v1/chat/completions", "body": body}


@pytest.fixture
def decode(run):
    """Return a function of rows and options that returns the written rows in the input's order."""

    def call(rows, *options):
        code, written = run(rows, *options)
        assert code == any(result["error"] is not None for result in written)
        return sorted(written, key=lambda result: int(result["id"].removeprefix("batch_req_")))

    return call


@pytest.fixture
def choices(decode):
    """Return a function of options and a body that returns the choices of its response."""

    def call(*options, **body):
        (written,) = decode([row("a", **body)], *options)
        return written["response"]["body"]["choices"]

    return call


def test_written_row_has_openai_fields(decode, run):
    written = decode([row("x", prompt="def", max_tokens=5, temperature=0, **NO_EOS)])
    plain = {"prompt": "def", "max_new_tokens": 5, "temperature": 0, **NO_EOS}
    _, (expected,) = run([plain])
    text, num_prompt_tokens = expected["completion"], expected["num_prompt_tokens"]
    body = {
        "id": "cmpl-0",
        "object": "text_completion",
        "created": 0,
        "model": "demo",
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": 5,
            "total_tokens": num_prompt_tokens + 5,
        },
    }
    response = {"status_code": 200, "request_id": "req_0", "body": body}
    assert written == [{"id": "batch_req_0", "custom_id": "x", "response": response, "error": None}]


def test_defaults_are_openais_unless_the_command_line_has_others(decode, choices):
    (written,) = decode([row("a", prompt="x", **NO_EOS)])
    assert written["response"]["body"]["usage"]["completion_tokens"] == 16
    drawn = choices(prompt="x", **NO_EOS)[0]["text"]
    greedy = choices(prompt="x", temperature=0, **NO_EOS)[0]["text"]
    assert drawn != greedy
    assert choices("--temperature", "0", "--stop-at-eos", "false", prompt="x")[0]["text"] == greedy
    (written,) = decode([row("a", prompt="x", **NO_EOS)], "--max-new-tokens", "3")
    assert written["response"]["body"]["usage"]["completion_tokens"] == 3


def test_choices_are_ordered_by_prompt_and_completion(choices, code_tokenizer):
    prompts = ["def", "", "x = 1"]
    tokens = [[code_tokenizer.bos_id, *code_tokenizer.encode(prompt)] for prompt in prompts]
    several = choices(prompt=prompts, n=2, seed=5)
    assert [choice["index"] for choice in several] == list(range(6))
    assert len({choice["text"] for choice in several}) == 6
    assert choices(prompt=tokens, n=2, seed=5) == several
    assert choices(prompt=prompts[0], seed=5) == several[:1]
    assert choices(prompt=tokens[0], n=2, best_of=2, seed=5) == several[:2]
    assert choices(prompt=prompts, n=2, seed=6) != several
    greedy = choices(prompt=prompts, n=2, temperature=0)
    alone = [choices(prompt=prompt, temperature=0)[0]["text"] for prompt in prompts for _ in "12"]
    assert [choice["text"] for choice in greedy] == alone


def test_usage_counts_each_prompt_once(decode):
    (written,) = decode([row("a", prompt=["x", [1, 2, 3]], n=3, max_tokens=4, **NO_EOS)])
    usage = {"prompt_tokens": 2 + 3, "completion_tokens": 24, "total_tokens": 29}
    assert written["response"]["body"]["usage"] == usage


def test_rows_without_seeds_have_different_seeds(decode):
    written = decode([row("a", prompt="x"), row("b", prompt="x")])
    texts = {result["response"]["body"]["choices"][0]["text"] for result in written}
    assert len(texts) == 2


def test_echo_prepends_the_prompt(choices, code_tokenizer):
    tokens = [code_tokenizer.bos_id, *code_tokenizer.encode("größe\n")]
    plain = choices(prompt="größe\n", n=2)
    for prompt in ("größe\n", tokens):
        echoed = choices(prompt=prompt, n=2, echo=True)
        texts = [choice["text"] for choice in echoed]
        assert texts == ["größe\n" + choice["text"] for choice in plain]
    several = choices(prompt=["a", tokens], n=2, echo=True)
    for choice, prompt in zip(several, ["a", "a", "größe", "größe"], strict=True):
        assert choice["text"].startswith(prompt)


def test_logprobs_equal_those_of_a_plain_row(choices, run, code_tokenizer):
    settings = {"prompt": "def", "logprobs": 3, "seed": 3, **NO_EOS}
    (choice,) = choices(**settings, max_tokens=12)
    _, (plain,) = run([{**settings, "max_new_tokens": 12, "temperature": 1}])
    assert choice["text"] == plain["completion"]
    logprobs, named = choice["logprobs"], code_tokenizer.token_text
    assert {len(values) for values in logprobs.values()} == {12}
    for at, expected in enumerate(plain["logprobs"]):
        assert logprobs["tokens"][at] == named(expected["token"])
        assert logprobs["token_logprobs"][at] == expected["logprob"]
        top = {named(int(token)): value for token, value in expected["top"].items()}
        top[named(expected["token"])] = expected["logprob"]
        assert logprobs["top_logprobs"][at] == top


def test_prompt_logprobs_equal_the_forward_pass(choices, code_model, code_tokenizer):
    text = "def größe(x):"
    tokens = [code_tokenizer.bos_id, *code_tokenizer.encode(text)]
    with torch.no_grad():
        expected = code_model(torch.tensor([tokens]))[0].double().log_softmax(-1)
    expected = [row[token].item() for row, token in zip(expected, tokens[1:], strict=False)]
    names = [code_tokenizer.token_text(token) for token in tokens]
    for count in (0, 1, 5):
        settings = {"max_tokens": count, "logprobs": 2, "echo": True, "temperature": 0, **NO_EOS}
        (from_ids,) = choices(prompt=tokens, **settings)
        (from_text,) = choices(prompt=text, **settings)
        assert from_ids["text"] == from_text["text"]
        assert from_ids["text"].startswith(text)
        for choice, first in ((from_ids, 0), (from_text, 1)):
            logprobs = choice["logprobs"]
            assert {len(values) for values in logprobs.values()} == {len(tokens) - first + count}
            assert logprobs["tokens"][: len(tokens) - first] == names[first:]
            begin = 1 - first
            assert logprobs["token_logprobs"][:begin] == [None] * begin
            assert logprobs["top_logprobs"][:begin] == [None] * begin
            found = logprobs["token_logprobs"][begin : begin + len(expected)]
            assert found == pytest.approx(expected, abs=2e-5)
            pairs = zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
            for logprob, top in list(pairs)[begin:]:
                assert logprob in top.values()  # to the last bit
                assert len(top) in (2, 3)
            starts = [*logprobs["text_offset"], len(choice["text"])]
            assert starts == sorted(starts)
            assert choice["text"][starts[begin] : starts[begin + 1]] == names[1]


def test_tokens_of_one_name_report_the_larger_probability(code_tokenizer):
    """Clients take the largest as that of the most probable token."""
    letter = code_tokenizer.encode("f")[0]
    byte = next(i for i in range(280) if i != letter and code_tokenizer.token_text(i) == "f")
    writer = TextChoiceWriter(code_tokenizer, REQUEST, 0, None, False)
    logprobs = [TokenLogprobs(byte, -5.0, {letter: -0.1}, 2)]
    choice = writer.write(Completion("f", [byte], logprobs, "length"))
    assert choice["logprobs"]["token_logprobs"] == [-5.0]
    assert choice["logprobs"]["top_logprobs"] == [{"f": -0.1}]


@pytest.mark.parametrize("echo", [None, "größe"])
def test_streamed_pieces_add_up_to_the_whole_choice(code_tokenizer, echo):
    tokens = code_tokenizer.encode("x = größe + 1\n")
    text = "x = größe + 1\n"
    logprobs = [
        TokenLogprobs(token, -1.0 - at, {token: -1.0 - at}, 1) for at, token in enumerate(tokens)
    ]
    prompt = [TokenLogprobs(token, -9.0, {}, 5) for token in REQUEST.prompt_token_ids[1:]]
    whole = TextChoiceWriter(code_tokenizer, REQUEST, 3, echo, True).write(
        Completion(text, tokens, logprobs, "length", prompt)
    )
    writer = TextChoiceWriter(code_tokenizer, REQUEST, 3, echo, True)
    stream, pieces = TextStream(code_tokenizer, ()), []
    for at, token in enumerate(logprobs):
        reason = "length" if at + 1 == len(tokens) else None
        piece = stream.append(token.token), [token.token], [token], reason, () if at else prompt
        pieces.append(writer.write(Completion(*piece)))
    assert "".join(piece["text"] for piece in pieces) == whole["text"] == (echo or "") + text
    for field, values in whole["logprobs"].items():
        assert [item for piece in pieces for item in piece["logprobs"][field]] == values
    assert pieces[-1]["finish_reason"] == whole["finish_reason"]


def test_completions_follow_their_response_format(choices):
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    for response_format, expected in (
        ({"type": "regex", "regex": "(yes|no)!"}, "(yes|no)!"),
        ({"type": "json_schema", "json_schema": {"schema": schema}}, r'\{"a":null[^\n]*\}'),
    ):
        found = choices(prompt="x", response_format=response_format, n=3, max_tokens=60)
        ended = [choice["text"] for choice in found if choice["finish_reason"] == "stop"]
        assert ended
        assert all(re.fullmatch(expected, text) for text in ended)


def test_text_offsets_are_where_the_texts_of_tokens_begin(code_tokenizer):
    builder = RequestBuilder(code_tokenizer, {"seed": 0, "max_new_tokens": 40})
    common = {"tokenizer": code_tokenizer, "model_name": "demo", "max_seq_len": 64}
    completions = TextCompletions(builder, **common)
    text = "größe = x + 1"
    tokens = code_tokenizer.encode(text + "STOP")
    logprobs = [TokenLogprobs(token, -1.0, {}, 5) for token in tokens]
    completion = Completion(text, tokens, logprobs, "stop")
    body = completions.read({"prompt": "def", "logprobs": 0})
    requests = completions.requests(0, body)
    (choice,) = completions.answer(0, body, requests, [completion])["choices"]
    names, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    shown = list(zip(names, offsets, strict=True))
    in_bytes = [(f"bytes:\\x{byte:02x}", 2 + at // 2) for at, byte in enumerate("öß".encode())]
    assert shown[:6] == [("g", 0), ("r", 1), *in_bytes]
    for name, offset in shown[6:-4]:
        assert text[offset:].startswith(name)
    assert offsets[-3:] == [len(text)] * 3


def dummy_prefix():
    model, options = io.BytesIO(), {"vocab_size": 300, "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(20 * ["hello world the cat"]),
        model_writer=model,
        model_type="bpe",
        **options,
    )
    return SentencePieceTokenizer({"tokenizer.model": model.getvalue()}, Path("x"))


def metaspace():
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    trained.train_from_iterator(20 * ["hello world the cat"], trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    contents = {"tokenizer.json": trained.to_str(), "tokenizer_config.json": json.dumps(names)}
    files = {name: text.encode() for name, text in contents.items()}
    return HuggingFaceTokenizer(files, Path("x"))


@pytest.mark.parametrize("make", [dummy_prefix, metaspace])
def test_text_offsets_of_a_tokenizer_that_puts_a_space_before_texts(make):
    tokenizer = make()
    builder = RequestBuilder(tokenizer, {"seed": 0})
    common = {"tokenizer": tokenizer, "model_name": "demo", "max_seq_len": 64}
    completions = TextCompletions(builder, **common)
    ids, new = tokenizer.encode("hello world the"), tokenizer.encode("cat")
    for prompt in ("hello world the", ids, [tokenizer.bos_id, *ids], " hello world the"):
        body = completions.read({"prompt": prompt, "logprobs": 0, "echo": True})
        (request,) = completions.requests(0, body)
        given, added = (
            [TokenLogprobs(token, -1.0, {}, 1) for token in tokens]
            for tokens in (request.prompt_token_ids[1:], new)
        )
        completion = Completion(" cat", new, added, "length", given)
        (choice,) = completions.answer(0, body, [request], [completion])["choices"]
        text, offsets = choice["text"], choice["logprobs"]["text_offset"]
        names = choice["logprobs"]["tokens"]
        shown = [text[start:end] for start, end in pairwise([*offsets, len(text)])]
        assert "".join(shown) == text
        if prompt[0] == tokenizer.bos_id:
            assert (names.pop(0), shown.pop(0)) == ("<s>", "")
        if prompt[0] != " ":
            assert not text.startswith(" ")
            shown[0] = f" {shown[0]}"
        assert shown == names


def test_logprobs_without_top_tokens_and_of_an_empty_completion(choices):
    (choice,) = choices(prompt="x", logprobs=0, max_tokens=3, **NO_EOS)
    assert [list(top) for top in choice["logprobs"]["top_logprobs"]] == [
        [name] for name in choice["logprobs"]["tokens"]
    ]
    eos = {"logit_bias": {"2": 100}}
    (choice,) = choices(prompt="x", logprobs=2, **eos)
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert (choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]) == (["</s>"], [0])


PROMPT = {"prompt": "x"}
HI = {"role": "user", "content": "hi"}


def test_a_response_has_the_text_of_a_chat(run):
    def response(custom_id, **body):
        return {**row(custom_id), "url": "/v1/responses", "body": {"input": "hi", **body}}

    same = {"seed": 1, "logit_bias": {"2": -100}}
    rows = [
        chat("a", [HI], max_tokens=5, **same),
        response("b", max_output_tokens=5, **same),
        response("c", previous_response_id="resp_1"),
    ]
    code, (first, second, third) = run(rows)
    assert code == 1
    assert "a batch finds no earlier responses" in third["error"]["message"]
    answer, written = first["response"]["body"], second["response"]["body"]
    (item,) = written["output"]
    assert item["content"][0]["text"] == answer["choices"][0]["message"]["content"]
    assert (written["status"], written["usage"]["output_tokens"]) == ("incomplete", 5)


BAD_ROWS = [
    ({**row("", **PROMPT), "method": "GET"}, 'method="GET" is not allowed: it must be "POST"'),
    ({**row("", **PROMPT), "url": "/v2"}, 'url="/v2" is not allowed: it must be "/v1/compl'),
    ({**row("", **PROMPT), "url": ["/v1"]}, 'url=["/v1"] is not allowed: it must be'),
    ({**row("", **PROMPT), "body": []}, "body=[] is not allowed: it must be a JSON object"),
    ({**row("", **PROMPT), "bdy": {}}, "unknown field \"bdy\": did you mean 'body'?"),
    ({}, 'method=null is not allowed: it must be "POST"'),
    (chat("", [HI], prompt="x"), "prompt is not allowed: there is no such field, leave it out"),
    (row(""), 'field "prompt" is missing'),
    (chat("", None), 'field "messages" is missing'),
    (chat("", [{"role": "user"}]), "messages.0.content=null is not allowed: it must be a string"),
    (chat("", [HI], stream=True), "stream=true is not allowed: it must be false"),
    (chat("", [HI], max_tokens=70), "max_seq_len=64"),
    (chat("", [HI], tools=[{}]), 'field "tools.0.type" is missing'),
    (row("", **PROMPT, tools=[{}]), "use /v1/chat/completions, where the model may call tools"),
    *(
        (row("", **{**PROMPT, **body}), message)
        for body, message in [
            ({"prompt": ["x", 5]}, "prompt is not allowed: it must be a string, a list of"),
            ({"prompt": ["x", "\ud800"]}, "prompt is not allowed: it has half of a surrogate pair"),
            (
                {"prompt": [[1, 280]]},
                "prompt is not allowed: it has the id 280, and the vocabulary ids 0 to 279",
            ),
            ({"model": 5}, "model=5 is not allowed: it must be a string"),
            ({"model": "\ud800"}, "model is not allowed: it has half of a surrogate pair"),
            ({"max_tokens": 70}, "70 new tokens are 72: lower the limit of new tokens to 62"),
            ({"max_new_tokens": 5}, "max_new_tokens is not allowed: there is no such field, did"),
            ({"temprature": 1}, 'did you mean "temperature"?'),
            ({"stream": True}, "stream=true is not allowed: it must be false"),
            ({"logit_bias": {"x": 1}}, 'logit_bias={"x": 1.0} is not allowed'),
        ]
    ),
    *(
        (row("", **PROMPT, response_format=response_format), message)
        for response_format, message in [
            ("json", 'response_format="json" is not allowed: it'),
            ({"type": "regex"}, "response_format.regex=null is not allowed: it must be a string"),
            (
                {"type": "json_schema", "json_schema": {"x": 1}},
                'response_format.json_schema={"x": 1} is not allowed: it must be an object with',
            ),
            (
                {"type": "text", "regex": "a"},
                "response_format.regex is not allowed: there is no such field here, use type",
            ),
        ]
    ),
]
ROWS_WITHOUT_ID = [
    (row(5, **PROMPT), "custom_id=5 is not allowed: it must be a str"),
    ({"body": PROMPT}, 'field "custom_id" is missing'),
    (row("\ud800", **PROMPT), "custom_id is not allowed: it has half of a surrogate pair"),
    ("nothing", "not JSON"),
]


def test_bad_rows_are_refused_and_change_no_other(decode):
    good = row("a", prompt="def"), row("z", prompt="f(x)")
    bad = [
        (f"k{at}", {**fields, "custom_id": f"k{at}"}, message)
        for at, (fields, message) in enumerate(BAD_ROWS)
    ]
    bad += [(None, line, message) for line, message in ROWS_WITHOUT_ID]
    bad += [("a", row("a", **PROMPT), 'custom_id="a" is not allowed: line 1 has it already')]
    first, *refused, last = decode([good[0], *(line for _, line, _ in bad), good[1]])
    for number, ((custom_id, _, message), result) in enumerate(zip(bad, refused, strict=True), 2):
        assert result["error"]["message"].startswith(f"line {number}: ")
        assert message in result["error"]["message"]
        assert result["custom_id"] == custom_id
        assert result["response"]["status_code"] == 400
        is_too_long = "maximum context length is" in result["error"]["message"]
        code = "context_length_exceeded" if is_too_long else None
        assert result["error"]["code"] == (code or "invalid_request_error")
        body = result["response"]["body"]["error"]
        assert (body["code"], body["message"]) == (code, result["error"]["message"])
    assert [first, last] == decode([good[0], *[" "] * len(bad), good[1]])


def test_one_file_may_have_chats_and_texts(decode, code_tokenizer):
    settings = {"temperature": 0, "max_tokens": 6, **NO_EOS}
    messages = [{"role": "system", "content": "x"}, HI]
    text = "system: x\n\nuser: hi\n\nassistant:"
    # With the default number of new tokens this is longer than the context: fewer are generated.
    long = [{"role": "user", "content": "x" * 28}]
    written = decode(
        [
            chat("a", messages, **settings, logprobs=True, top_logprobs=2),
            row("b", prompt=text, **settings, logprobs=2),
            chat("c", [HI], n=2, **NO_EOS),
            chat("d", long, **NO_EOS),
        ]
    )
    chatted, texted, several, filled = (result["response"]["body"] for result in written)
    assert [result["custom_id"] for result in written] == ["a", "b", "c", "d"]
    assert (chatted["id"], chatted["object"]) == ("chatcmpl-0", "chat.completion")
    assert chatted["usage"] == texted["usage"]
    (choice,), (expected,) = chatted["choices"], texted["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected["text"]}
    assert choice["finish_reason"] == expected["finish_reason"] == "length"
    logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
    assert logprobs == expected["logprobs"]["token_logprobs"]
    assert [choice["index"] for choice in several["choices"]] == [0, 1]
    assert several["usage"]["completion_tokens"] == 2 * 9  # the model directory's
    assert filled["usage"]["total_tokens"] <= 64
    (written,) = decode([chat("a", [HI], **NO_EOS)], "--max-new-tokens", "3")
    assert written["response"]["body"]["usage"]["completion_tokens"] == 3


def test_model_directory_may_have_a_chat_template(tmp_path, model_directory, capsys):
    model, source, target = tmp_path / "model", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    shutil.copytree(model_directory, model)
    template = model / "chat_template.jinja"
    template.write_text(
        "{% for message in messages %}{% if message.role == 'system' %}"
        "{{ raise_exception('no system prompts') }}{% endif %}<{{ message.content }}>{% endfor %}"
    )
    settings = {"temperature": 0, **NO_EOS}
    rows = [chat("a", [HI], **settings), row("b", prompt="<hi>", max_tokens=9, **settings)]
    write_rows(source, [*rows, chat("c", [{"role": "system", "content": "x"}])])
    assert generate(model, source, target) == 1
    first, second, refused = sorted(read_rows(target), key=lambda result: result["custom_id"])
    texts = first["response"]["body"]["choices"], second["response"]["body"]["choices"]
    assert texts[0][0]["message"]["content"] == texts[1][0]["text"]
    assert "line 3: the chat template cannot write messages: no system" in str(refused)
    template.write_text("{{ messages[0].content }}")
    assert generate(model, source, target) == 2
    assert "was begun with chat_template=" in capsys.readouterr().err


def test_failure_of_the_model_has_the_code_server_error():
    refused = OpenAiRows({}).refused(Refusal(3, "k", "bad", 500))
    assert refused["response"]["status_code"] == 500
    assert refused["response"]["body"]["error"]["type"] == "server_error"
    assert refused["error"] == {"code": "server_error", "message": "bad"}


def test_first_readable_row_decides_the_format(run, decode):
    rows = ["nothing", row("a", prompt="x"), {"prompt": "x"}]
    written = decode(rows)
    assert [result["error"] is None for result in written] == [False, True, False]
    _, written = run([{"prompt": "x"}, row("a", prompt="x")])
    assert ["error" in result for result in written] == [False, True]
    assert decode(["nothing", row("a", prompt="x")], "--format", "openai")[1]["error"] is None
    _, written = run([row("a", prompt="x")], "--format", "prompts")
    assert "unknown field" in written[0]["error"]


def test_stopped_run_of_openai_rows_resumes(tmp_path, decode, model_directory):
    rows = [row(str(number), prompt="x", logprobs=2, n=2) for number in range(20)]
    whole = decode([*rows, "nothing"], "--batch-invariant")
    target = tmp_path / "1.out.jsonl"
    lines = target.read_text(encoding="utf-8").splitlines(keepends=True)
    target.write_text("".join(lines[:9]) + lines[9][:50], encoding="utf-8")
    again = generate(model_directory, tmp_path / "1.in.jsonl", target, "--batch-invariant")
    assert again == 1
    after = target.read_text(encoding="utf-8").splitlines(keepends=True)
    assert sorted(after) == sorted(lines)
    assert len(whole) == 21


def test_embeddings_are_those_of_the_server(decode, model_directory):
    """A file may have rows for all urls."""
    body = {"model": "demo", "input": ["def", [1, 5]], "pooling": "last"}
    asked = {**row("a"), "url": "/v1/embeddings", "body": body}
    written, text = decode([asked, row("b", prompt="x")])
    answer = written["response"]["body"]
    llm = LLM(model_directory, "cpu", cache_gib=0.01)
    expected = llm.embed(["def", [1, 5]], "last", use_tqdm=False)
    for index, (data, embedded) in enumerate(zip(answer["data"], expected, strict=True)):
        assert (data["object"], data["index"]) == ("embedding", index)
        assert data["embedding"] == pytest.approx(embedded.embedding, abs=1e-6)
    pair = {"model": "demo", "text_1": "def", "text_2": [[1, 5]], "pooling": "last"}
    (scored,) = decode([{**row("a"), "url": "/v1/score", "body": pair}])
    (score,) = scored["response"]["body"]["data"]
    products = zip(*(embedded.embedding for embedded in expected), strict=True)
    assert score["score"] == pytest.approx(sum(a * b for a, b in products), abs=1e-6)
    num_tokens = sum(len(embedded.prompt_token_ids) for embedded in expected)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == num_tokens
    assert (answer["object"], answer["model"]) == ("list", "demo")
    assert text["response"]["body"]["object"] == "text_completion"
    refused = {**asked, "body": {"input": "x", "model": "\ud800"}}
    assert (
        "model is not allowed: it has half of a surrogate pair"
        in decode([refused])[0]["error"]["message"]
    )
