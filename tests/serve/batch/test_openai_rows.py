"""`stu-generate` on OpenAI's batch format."""

import re
import shutil
from dataclasses import replace

import pytest
import torch

from serve.batch.openai_rows import OpenAiRows
from serve.batch.rows import Refusal
from serve.completion import Completion
from serve.openai.choices import TextChoiceWriter
from serve.openai.completions import TextCompletions
from serve.prompts import RequestBuilder
from serve.request import TokenLogprobs
from serve.sampling.detokenizer import TextStream
from serve.sampling_params import SamplingParams
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
    """Call with rows and options: what was written for each."""

    def call(rows, *options):
        code, written = run(rows, *options)
        assert code == any(its["error"] is not None for its in written)
        return sorted(written, key=lambda its: int(its["id"].removeprefix("batch_req_")))

    return call


@pytest.fixture
def choices(decode):
    """Call with a body and options: its choices."""

    def call(*options, **body):
        (written,) = decode([row("a", **body)], *options)
        return written["response"]["body"]["choices"]

    return call


def test_what_is_written(decode, run):
    written = decode([row("x", prompt="def", max_tokens=5, temperature=0, **NO_EOS)])
    plain = {"prompt": "def", "max_new_tokens": 5, "temperature": 0, **NO_EOS}
    ((_, (expected,)),) = [run([plain])]
    choice = {
        "index": 0,
        "text": expected["completion"],
        "logprobs": None,
        "finish_reason": "length",
    }
    num_prompt_tokens = expected["num_prompt_tokens"]
    body = {
        "id": "cmpl-0",
        "object": "text_completion",
        "created": 0,
        "model": "demo",
        "choices": [choice],
        "usage": {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": 5,
            "total_tokens": num_prompt_tokens + 5,
        },
    }
    response = {"status_code": 200, "request_id": "req_0", "body": body}
    assert written == [{"id": "batch_req_0", "custom_id": "x", "response": response, "error": None}]


def test_defaults_are_openai_s_unless_the_command_line_has_others(decode, choices):
    (written,) = decode([row("a", prompt="x", **NO_EOS)])
    assert written["response"]["body"]["usage"]["completion_tokens"] == 16
    drawn = choices(prompt="x", **NO_EOS)[0]["text"]
    greedy = choices(prompt="x", temperature=0, **NO_EOS)[0]["text"]
    assert drawn != greedy
    assert choices("--temperature", "0", "--stop-at-eos", "false", prompt="x")[0]["text"] == greedy
    (written,) = decode([row("a", prompt="x", **NO_EOS)], "--max-new-tokens", "3")
    assert written["response"]["body"]["usage"]["completion_tokens"] == 3


def test_null_is_as_good_as_nothing(choices):
    names = "max_tokens temperature top_p n stop seed logprobs echo logit_bias presence_penalty "
    names += "frequency_penalty best_of suffix stream user model top_k stop_at_eos"
    assert choices(prompt="x", **dict.fromkeys(names.split())) == choices(prompt="x")


def test_neutral_settings_change_nothing(choices):
    neutral = {"best_of": 2, "suffix": "", "stream": False, "user": "someone", "echo": False}
    assert choices(prompt="x", n=2, **neutral) == choices(prompt="x", n=2)


def test_prompts_and_completions_of_a_row_are_choices_in_their_order(choices, code_tokenizer):
    prompts = ["def", "", "x = 1"]
    tokens = [[code_tokenizer.bos_id, *code_tokenizer.encode(prompt)] for prompt in prompts]
    several = choices(prompt=prompts, n=2, seed=5)
    assert [choice["index"] for choice in several] == list(range(6))
    assert len({choice["text"] for choice in several}) == 6
    assert choices(prompt=tokens, n=2, seed=5) == several
    assert choices(prompt=prompts[0], seed=5) == several[:1]
    assert choices(prompt=tokens[0], n=2, seed=5) == several[:2]
    assert choices(prompt=prompts, n=2, seed=6) != several
    greedy = choices(prompt=prompts, n=2, temperature=0)
    for at, prompt in enumerate(prompts):
        (alone,) = choices(prompt=prompt, temperature=0)
        assert [its["text"] for its in greedy[2 * at : 2 * at + 2]] == [alone["text"]] * 2


def test_a_prompt_counts_once(decode):
    (written,) = decode([row("a", prompt=["x", [1, 2, 3]], n=3, max_tokens=4, **NO_EOS)])
    usage = {"prompt_tokens": 2 + 3, "completion_tokens": 24, "total_tokens": 29}
    assert written["response"]["body"]["usage"] == usage


def test_rows_without_seeds_draw_differently(decode):
    written = decode([row("a", prompt="x"), row("b", prompt="x")])
    texts = {its["response"]["body"]["choices"][0]["text"] for its in written}
    assert len(texts) == 2


def test_stop_strings_and_eos_end_a_completion(choices):
    (whole,) = choices(prompt="x", temperature=0)
    stop = whole["text"][3:5]
    (cut,) = choices(prompt="x", temperature=0, stop=["never", stop])
    assert (cut["text"], cut["finish_reason"]) == (whole["text"].split(stop)[0], "stop")
    assert choices(prompt="x", temperature=0, stop=stop) == [cut]


def test_echo_puts_the_prompt_before_the_completion(choices, code_tokenizer):
    tokens = [code_tokenizer.bos_id, *code_tokenizer.encode("größe\n")]
    plain = choices(prompt="größe\n", n=2)
    for prompt in ("größe\n", tokens):
        echoed = choices(prompt=prompt, n=2, echo=True)
        assert [its["text"] for its in echoed] == ["größe\n" + its["text"] for its in plain]
    several = choices(prompt=["a", tokens], n=2, echo=True)
    assert [its["text"][:6].rstrip("\n") for its in several[2:]] == ["größe"] * 2
    assert [its["text"][:1] for its in several[:2]] == ["a"] * 2


def test_logprobs_are_those_of_the_tokens(choices, run, code_tokenizer):
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


def test_the_logprobs_of_a_prompt(choices, code_model, code_tokenizer):
    """Those of the model's whole forward pass, whatever is decoded after it."""
    text = "def größe(x):"
    tokens = [code_tokenizer.bos_id, *code_tokenizer.encode(text)]
    with torch.no_grad():
        expected = code_model(torch.tensor([tokens]))[0].double().log_softmax(-1)
    expected = [row[token].item() for row, token in zip(expected, tokens[1:], strict=False)]
    names = [code_tokenizer.token_text(token) for token in tokens]
    for count in (0, 1, 5):
        settings = {"max_tokens": count, "logprobs": 2, "echo": True, "temperature": 0, **NO_EOS}
        (of_ids,) = choices(prompt=tokens, **settings)
        (of_text,) = choices(prompt=text, **settings)
        assert of_ids["text"] == of_text["text"]
        assert of_ids["text"].startswith(text)
        for choice, first in ((of_ids, 0), (of_text, 1)):
            logprobs = choice["logprobs"]
            assert {len(values) for values in logprobs.values()} == {len(tokens) - first + count}
            assert logprobs["tokens"][: len(tokens) - first] == names[first:]
            begin = 1 - first
            assert logprobs["token_logprobs"][:begin] == [None] * begin
            assert logprobs["top_logprobs"][:begin] == [None] * begin
            found = logprobs["token_logprobs"][begin : begin + len(expected)]
            assert found == pytest.approx(expected, abs=2e-5)
            for its, top in list(
                zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
            )[begin:]:
                assert its in top.values()  # to the last bit
                assert len(top) in (2, 3)
            starts = [*logprobs["text_offset"], len(choice["text"])]
            assert starts == sorted(starts)
            assert choice["text"][starts[begin] : starts[begin + 1]] == names[1]


def test_tokens_that_share_a_name_share_the_larger_probability(code_tokenizer):
    """Clients take the largest for that of the most probable token."""
    letter = code_tokenizer.encode("f")[0]
    byte = next(i for i in range(280) if i != letter and code_tokenizer.token_text(i) == "f")
    writer = TextChoiceWriter(code_tokenizer, replace(REQUEST), 0, None, False)
    logprobs = [TokenLogprobs(byte, -5.0, {letter: -0.1})]
    choice = writer.write(Completion("f", [byte], logprobs, "length"))
    assert choice["logprobs"]["token_logprobs"] == [-5.0]
    assert choice["logprobs"]["top_logprobs"] == [{"f": -0.1}]


@pytest.mark.parametrize("echo", [None, "größe"])
def test_pieces_make_the_whole(code_tokenizer, echo):
    tokens = code_tokenizer.encode("x = größe + 1\n")
    text = "x = größe + 1\n"
    logprobs = [
        TokenLogprobs(token, -1.0 - at, {token: -1.0 - at}) for at, token in enumerate(tokens)
    ]
    prompt = [TokenLogprobs(token, -9.0, {}) for token in REQUEST.prompt_token_ids[1:]]
    whole = TextChoiceWriter(code_tokenizer, REQUEST, 3, echo, True).write(
        Completion(text, tokens, logprobs, "length", prompt)
    )
    writer, stream = (
        TextChoiceWriter(code_tokenizer, REQUEST, 3, echo, True),
        TextStream(code_tokenizer, ()),
    )
    pieces = []
    for at, its in enumerate(logprobs):
        reason = "length" if at + 1 == len(tokens) else None
        of_prompt = prompt if at == 0 else ()
        pieces.append(
            writer.write(
                Completion(stream.append(its.token), [its.token], [its], reason, of_prompt)
            )
        )
    assert "".join(its["text"] for its in pieces) == whole["text"] == (echo or "") + text
    for field, values in whole["logprobs"].items():
        assert [item for its in pieces for item in its["logprobs"][field]] == values
    assert [its["finish_reason"] for its in pieces][-1] == whole["finish_reason"]


def test_response_formats(choices):
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    for response_format, expected in (
        ({"type": "regex", "regex": "(yes|no)!"}, "(yes|no)!"),
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"additionalProperties": False, **schema}},
            },
            r'\s*{\s*"a"\s*:\s*null\s*}\s*',
        ),
    ):
        for choice in choices(prompt="x", response_format=response_format, n=3, max_tokens=60):
            if choice["finish_reason"] == "stop":
                assert re.fullmatch(expected, choice["text"])


def test_offsets_say_where_a_token_s_text_begins(code_tokenizer):
    builder = RequestBuilder(code_tokenizer, {"seed": 0, "max_new_tokens": 40})
    completions, text = TextCompletions(builder, code_tokenizer, "demo"), "größe = x + 1"
    tokens = code_tokenizer.encode(text + "STOP")
    logprobs = [TokenLogprobs(token, -1.0, {}) for token in tokens]
    completion = Completion(text, tokens, logprobs, "stop")
    body = completions.read({"prompt": "def", "logprobs": 0})
    requests = completions.requests(0, body)
    (choice,) = completions.answer(0, body, requests, [completion])["choices"]
    names, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    shown = list(zip(names, offsets, strict=True))
    assert shown[:2] == [("g", 0), ("r", 1)]
    assert shown[2:6] == [
        (f"bytes:\\x{byte:02x}", 2 + at // 2) for at, byte in enumerate("öß".encode())
    ]
    for name, offset in shown[6:-4]:
        assert text[offset:].startswith(name)
    assert [offset for _, offset in shown[-3:]] == [len(text)] * 3


def test_logprobs_of_no_top_tokens_and_of_no_tokens(choices):
    (choice,) = choices(prompt="x", logprobs=0, max_tokens=3, **NO_EOS)
    assert [list(top) for top in choice["logprobs"]["top_logprobs"]] == [
        [name] for name in choice["logprobs"]["tokens"]
    ]
    eos = {"logit_bias": {"2": 100}}
    (choice,) = choices(prompt="x", logprobs=2, **eos)
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert set(map(len, choice["logprobs"].values())) == {0}


PROMPT = {"prompt": "x"}
HI = {"role": "user", "content": "hi"}
BAD_ROWS = [
    (
        {**row("k", **PROMPT), "method": "GET"},
        "k",
        'method="GET" is not allowed: it must be "POST"',
    ),
    ({**row("k", **PROMPT), "url": "/v2"}, "k", 'url="/v2" is not allowed: it must be "/v1/compl'),
    ({**row("k", **PROMPT), "url": ["/v1"]}, "k", 'url=["/v1"] is not allowed: it must be'),
    (
        chat("k", [HI], prompt="x"),
        "k",
        "prompt is not allowed: there is no such field, leave it out",
    ),
    (chat("k", None), "k", 'field "messages" is missing'),
    (chat("k", []), "k", "messages is not allowed: "),
    (
        chat("k", [{"role": "bard", "content": "x"}]),
        "k",
        "messages.0.role=\"bard\" is not allowed: it must be 'system'",
    ),
    (
        chat("k", [{"role": "user"}]),
        "k",
        "messages.0.content=null is not allowed: it must be a string",
    ),
    (chat("k", [{"role": "user", "content": "\ud800"}]), "k", "half of a surrogate pair"),
    (chat("k", [HI], stream=True), "k", "stream=true is not allowed: it must be false"),
    (chat("k", [HI], max_tokens=70), "k", "max_seq_len=64"),
    (
        chat("k", [HI], top_logprobs=3),
        "k",
        "top_logprobs=3 is not allowed: it must be used with logprobs=true",
    ),
    (chat("k", [HI], tools=[{}]), "k", "the model calls no tools"),
    (chat("k", [HI], n=0), "k", "n=0 is not allowed"),
    ({**row("k", **PROMPT), "body": []}, "k", "body=[] is not allowed: it must be a JSON object"),
    ({**row("k", **PROMPT), "bdy": {}}, "k", "unknown field \"bdy\": did you mean 'body'?"),
    ({"custom_id": "k"}, "k", 'method=null is not allowed: it must be "POST"'),
    ({**row("k", **PROMPT), "custom_id": 5}, None, "custom_id=5 is not allowed: it must be a str"),
    ({"body": {"prompt": "x"}}, None, 'field "custom_id" is missing'),
    (row("a", **PROMPT), "a", 'custom_id="a" is not allowed: line 1 has it already'),
    (row("\ud800", **PROMPT), None, "custom_id has half of a surrogate pair"),
    (row("k"), "k", 'field "prompt" is missing'),
    (row("k", prompt=5), "k", "prompt=5 is not allowed"),
    (row("k", prompt=["x", 5]), "k", "prompt is not allowed: it must be a string, a list of"),
    (row("k", prompt=["x", "\ud800"]), "k", "prompt has half of a surrogate pair"),
    (row("k", prompt=["x"] * 129), "k", "a list of at most 128 prompts, not 129"),
    (row("k", prompt=[[1, 280]]), "k", "prompt has the id 280, and the vocabulary ids 0 to 279"),
    (row("k", **PROMPT, model=5), "k", "model=5 is not allowed: it must be a string"),
    (row("k", **PROMPT, model="\ud800"), "k", "model has half of a surrogate pair"),
    (row("k", **PROMPT, max_tokens=-1), "k", "max_tokens=-1 is not allowed"),
    (
        row("k", **PROMPT, max_tokens=70),
        "k",
        "70 new tokens are 72: lower the limit of new tokens to 62",
    ),
    (
        row("k", **PROMPT, max_new_tokens=5),
        "k",
        "max_new_tokens is not allowed: there is no such field, did you mean",
    ),
    (row("k", **PROMPT, temprature=1), "k", 'did you mean "temperature"?'),
    (row("k", **PROMPT, n=0), "k", "n=0 is not allowed: it must be a whole number from 1 to 128"),
    (row("k", **PROMPT, n=129), "k", "n=129 is not allowed"),
    (row("k", **PROMPT, n=True), "k", "n=true is not allowed"),
    (row("k", **PROMPT, best_of=2), "k", "best_of=2 is not allowed: it must be left out, or equal"),
    (row("k", **PROMPT, suffix="y"), "k", 'suffix="y" is not allowed: the model writes only after'),
    (row("k", **PROMPT, stream=True), "k", "stream=true is not allowed: it must be false"),
    (row("k", **PROMPT, echo=1), "k", "echo=1 is not allowed: it must be true or false"),
    (row("k", **PROMPT, response_format="json"), "k", 'response_format="json" is not allowed: it'),
    (
        row("k", **PROMPT, response_format={"type": "xml"}),
        "k",
        "it must be one of text, json",
    ),
    (
        row("k", **PROMPT, response_format={"type": "regex"}),
        "k",
        "response_format.regex=null is not allowed: it must be a string",
    ),
    (
        row("k", **PROMPT, response_format={"type": "regex", "regex": "(a"}),
        "k",
        "regex is not allowed: ",
    ),
    (
        row("k", **PROMPT, response_format={"type": "json_schema", "json_schema": {"x": 1}}),
        "k",
        'response_format.json_schema={"x": 1} is not allowed: it must be an object with the field',
    ),
    (
        row("k", **PROMPT, response_format={"type": "text", "regex": "a"}),
        "k",
        "response_format.regex is not allowed: there is no such field here, use type",
    ),
    (row("k", **PROMPT, logprobs=21), "k", "logprobs=21 is not allowed: it must be from 0 to 20"),
    (row("k", **PROMPT, logprobs=True), "k", "logprobs=true is not allowed"),
    (row("k", **PROMPT, stop=["a"] * 129), "k", "it must be at most 128 strings"),
    (row("k", **PROMPT, stop=5), "k", "stop=5 is not allowed"),
    (
        row("k", **PROMPT, temperature="1"),
        "k",
        'temperature="1" is not allowed: it must be a number',
    ),
    (row("k", **PROMPT, seed="1"), "k", 'seed="1" is not allowed: it must be a whole number'),
    (row("k", **PROMPT, presence_penalty=3), "k", "presence_penalty=3.0 is not allowed"),
    (row("k", **PROMPT, logit_bias={"x": 1}), "k", 'logit_bias={"x": 1.0} is not allowed'),
    (row("k", **PROMPT, logit_bias={"280": 1}), "k", "280"),
    ("nothing", None, "not JSON"),
]


@pytest.mark.parametrize(("bad", "custom_id", "message"), BAD_ROWS)
def test_a_bad_row_is_refused_and_the_others_are_not(decode, bad, custom_id, message):
    good = row("a", prompt="def"), row("z", prompt="f(x)")
    written = decode([good[0], bad, good[1]])
    refused = written[1]
    assert refused["custom_id"] == custom_id
    assert refused["response"]["status_code"] == 400
    is_too_long = "maximum context length is" in refused["error"]["message"]
    code = "context_length_exceeded" if is_too_long else None
    assert refused["error"]["code"] == (code or "invalid_request_error")
    assert refused["response"]["body"]["error"]["code"] == code
    assert refused["error"]["message"].startswith("line 2: ")
    assert message in refused["error"]["message"]
    assert refused["response"]["body"]["error"]["message"] == refused["error"]["message"]
    blank = decode([good[0], " ", good[1]])
    assert [written[0], written[2]] == blank


def test_chats_and_texts_in_one_file(decode, code_tokenizer):
    settings = {"temperature": 0, "max_tokens": 6, **NO_EOS}
    messages = [{"role": "system", "content": "x"}, HI]
    text = "system: x\n\nuser: hi\n\nassistant:"
    # Longer than the context with its default of new tokens: what room there is.
    long = [{"role": "user", "content": "x" * 28}]
    written = decode(
        [
            chat("a", messages, **settings, logprobs=True, top_logprobs=2),
            row("b", prompt=text, **settings, logprobs=2),
            chat("c", [HI], n=2, **NO_EOS),
            chat("d", long, **NO_EOS),
        ]
    )
    chatted, texted, several, filled = (its["response"]["body"] for its in written)
    assert [its["custom_id"] for its in written] == ["a", "b", "c", "d"]
    assert (chatted["id"], chatted["object"]) == ("chatcmpl-0", "chat.completion")
    assert chatted["usage"] == texted["usage"]
    (choice,), (expected,) = chatted["choices"], texted["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected["text"]}
    assert choice["finish_reason"] == expected["finish_reason"] == "length"
    logprobs = [its["logprob"] for its in choice["logprobs"]["content"]]
    assert logprobs == expected["logprobs"]["token_logprobs"]
    assert [its["index"] for its in several["choices"]] == [0, 1]
    assert several["usage"]["completion_tokens"] == 2 * 9  # the model directory's
    assert filled["usage"]["total_tokens"] <= 64
    (written,) = decode([chat("a", [HI], **NO_EOS)], "--max-new-tokens", "3")
    assert written["response"]["body"]["usage"]["completion_tokens"] == 3


def test_a_template_of_the_model_s_own(tmp_path, model_directory, capsys):
    model, source, target = tmp_path / "model", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    shutil.copytree(model_directory, model)
    template = model / "chat_template.jinja"
    template.write_text(
        "{% for its in messages %}{% if its.role == 'system' %}"
        "{{ raise_exception('no system prompts') }}{% endif %}<{{ its.content }}>{% endfor %}"
    )
    settings = {"temperature": 0, **NO_EOS}
    rows = [chat("a", [HI], **settings), row("b", prompt="<hi>", max_tokens=9, **settings)]
    write_rows(source, [*rows, chat("c", [{"role": "system", "content": "x"}])])
    assert generate(model, source, target) == 1
    first, second, refused = sorted(read_rows(target), key=lambda its: its["custom_id"])
    texts = first["response"]["body"]["choices"], second["response"]["body"]["choices"]
    assert texts[0][0]["message"]["content"] == texts[1][0]["text"]
    assert "line 3: the chat template cannot write messages: no system" in str(refused)
    template.write_text("{{ messages[0].content }}")
    assert generate(model, source, target) == 2
    assert "was begun with chat_template=" in capsys.readouterr().err


def test_a_failure_of_the_model_s_has_another_code(code_tokenizer):
    builder = RequestBuilder(code_tokenizer, {"seed": 0, "max_new_tokens": 5})
    rows = OpenAiRows(TextCompletions(builder, code_tokenizer, "demo"), None)
    refused = rows.refused(Refusal(3, "k", "bad", 500))
    assert refused["response"]["status_code"] == 500
    assert refused["response"]["body"]["error"]["type"] == "server_error"
    assert refused["error"] == {"code": "server_error", "message": "bad"}


def test_the_format_is_that_of_the_first_row_that_can_be_read(run, decode):
    rows = ["nothing", row("a", prompt="x"), {"prompt": "x"}]
    written = decode(rows)
    assert [its["error"] is None for its in written] == [False, True, False]
    _, written = run([{"prompt": "x"}, row("a", prompt="x")])
    assert ["error" in its for its in written] == [False, True]
    assert decode(["nothing", row("a", prompt="x")], "--format", "openai")[1]["error"] is None
    _, written = run([row("a", prompt="x")], "--format", "prompts")
    assert "unknown field" in written[0]["error"]


def test_a_run_goes_on(tmp_path, decode, model_directory):
    rows = [row(str(number), prompt="x", logprobs=2, n=2) for number in range(20)]
    whole = decode([*rows, "nothing"])
    target = tmp_path / "1.out.jsonl"
    lines = target.read_text(encoding="utf-8").splitlines(keepends=True)
    target.write_text("".join(lines[:9]) + lines[9][:50], encoding="utf-8")
    assert generate(model_directory, tmp_path / "1.in.jsonl", target) == 1
    after = target.read_text(encoding="utf-8").splitlines(keepends=True)
    assert sorted(after) == sorted(lines)
    assert len(whole) == 21
