"""Chat templates: rendered as by transformers, sandboxed and bounded."""

import json
import re
from itertools import chain

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from stu.chat import dialect
from stu.chat.template import PLAIN, TUNED, ChatTemplate
from stu.common.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief. <b>größe</b>"}
HELLO = {"role": "user", "content": " Hello\n"}
ANSWER = {"role": "assistant", "content": "<think>x</think>Hi 'you' & \"me\""}
GO = {"role": "user", "content": "go", "name": "Ann"}
CHATS = [[HELLO], [SYSTEM, HELLO], [SYSTEM, HELLO, ANSWER, GO], [HELLO, ANSWER, GO]]
TEMPLATES = {
    "roles between marks": """
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{% endif %}
""",
    "instructions with the system's inside": """
{%- if messages[0].role == 'system' -%}
    {%- set system, rest = messages[0].content, messages[1:] -%}
{%- else -%}
    {%- set system, rest = none, messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Roles must alternate') }}
    {%- endif -%}
    {%- if loop.first and system is not none -%}
        {%- set content = '<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' ~ message.content -%}
    {%- else -%}
        {%- set content = message.content -%}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{ bos_token ~ '[INST] ' ~ content.strip() ~ ' [/INST]' }}
    {%- else -%}
        {{ ' ' ~ content ~ ' ' ~ eos_token }}
    {%- endif -%}
{%- endfor -%}
""",
    "headers, a date, and what a model is trained on": """
{{- bos_token }}
{%- set date = strftime_now('%Y') if strftime_now is defined else 'unknown' %}
{{- 'Year: ' + date + '\\n' }}
{%- for m in messages %}
    {%- if m['role'] == 'assistant' %}
        {%- generation %}
        {%- set kept = m['content'].split('</think>')[-1] %}
        {{- '<|header|>assistant\\n' + kept + '</s>' }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|header|>' + m.role ~ '\\n' + m.content + '</s>' }}
    {%- endif %}
    {{- kept is defined }}
{%- endfor %}
""",
    "names, namespaces, and loops that end early": """
{% set ns = namespace(last=-1, seen='') %}
{% for message in messages | reverse %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% if message.role == 'user' %}
        {% set ns.last = messages | length - loop.index %}
        {% break %}
    {% endif %}
{% endfor %}
{% for message in messages %}
{% set ns.seen = ns.seen ~ message.role[0] %}
{{ loop.index }}/{{ loop.length }} {{ '*' * 3 if loop.index0 == ns.last else '-' }} {{ ns.seen }}
{{ message.name if message.name is defined else 'nobody' }}: {{ message.content | trim | upper }}
{% endfor %}
""",
    "JSON": """
{{ messages | tojson }}
{{ messages[0] | tojson(indent=2) }}
{{ messages | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}
{{ {'b': 'größe', 'a': [1, 2.5, none, true]} | tojson(ensure_ascii=False) }}
{{ dict(a=1) | tojson }} {{ dict.fromkeys('ab', 0) | items | list }}
""",
    "tools and documents, of which there are none": """
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if documents is not none %}{{ documents | length }}{% endif %}
{%- macro turn(message, prefix='') %}{{ prefix }}{{ message.role }}: {{ caller() }}{% endmacro %}
{%- for message in messages if message.role != 'system' %}
{%- call turn(message, prefix='# ') %}{{ message['content'] }}{% endcall %}{{ '\\n' }}
{%- else %}
nothing
{%- endfor %}
{{- enable_thinking | default('unset') }}{{ tools }}{{ pad_token is defined }}
""",
}


@pytest.fixture
def make(tmp_path, code_tokenizer):
    """Call with a template's source: the template of a model directory that has it."""

    def call(source):
        (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
        return ChatTemplate(tmp_path, code_tokenizer)

    return call


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_rendered_as_by_transformers(make, code_tokenizer, name):
    template = make(TEMPLATES[name])
    for messages in CHATS:
        for variables in ({}, {"enable_thinking": False}):
            expected, _ = render_jinja_template(
                [messages],
                chat_template=TEMPLATES[name],
                add_generation_prompt=True,
                bos_token="<s>",
                eos_token="</s>",
                **variables,
            )
            assert template.text(messages, variables) == expected[0]
            written = code_tokenizer.decode(template.tokens(messages, variables))
            assert written == expected[0].replace("<s>", "").replace("</s>", "")


@pytest.mark.parametrize("source", [*TEMPLATES.values(), PLAIN, TUNED])
def test_a_developer_is_the_system_for_a_template_that_does_not_know_the_role(
    make, code_tokenizer, source
):
    template, developer = make(source), {**SYSTEM, "role": "developer"}
    for rest in ([HELLO], [HELLO, ANSWER, GO]):
        assert template.text([developer, *rest]) == template.text([SYSTEM, *rest])
    knows = make("{% if messages[0].role == 'developer' %}{{ messages[0].content }}{% endif %}")
    assert (knows.text([developer]), knows.text([SYSTEM])) == (SYSTEM["content"], "")


def test_only_the_template_writes_control_tokens(make, code_tokenizer):
    bos, eos, encode = code_tokenizer.bos_id, code_tokenizer.eos_id, code_tokenizer.encode
    source = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}</s>{{ '</s>' }}x"
    tokens = make(source + "{% endfor %}").tokens([{"role": "user", "content": "a</s><s>b"}])
    assert tokens == [bos, *encode("a</s><s>b"), eos, eos, eos, *encode("x")]
    assert eos not in encode("a</s><s>b")
    without = make("{{ messages[0].content }}").tokens([HELLO])
    assert without == [bos, *encode(" Hello\n")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{{ raise_exception('Only ' ~ messages[0].role ~ ' is not enough') }}",
            "cannot write messages: Only user is not enough",
        ),
        ("{{ messages[0].content.nothing.more }}", "has no attribute 'nothing'"),
        ("{{ messages[5].role }}", "undefined|no element"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages | tojson(indent='x', separators=3) }}", "cannot write messages"),
        ("{{ nothing | tojson }}", "Undefined is not JSON"),
        ("{{ 'x' | int(base=99) + 'y' }}", "cannot write messages"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too deeply|longer than"),
    ],
)
def test_errors_of_a_template_reach_the_user(make, source, message):
    with pytest.raises(UserError, match=message):
        make(source).tokens([HELLO])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ dict.update(messages[0], {'a': 1}) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['json'] }}",
        "{% set n = namespace(__class__=1) %}{{ n.x }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ '{0.__class__}'.format(1) }}{{ '{0.__class__.x}'.format(1) }}",
        "{{ self.__init__.__globals__.x }}",
        "{% include 'chat_template.jinja' %}",
        "{% import '/etc/passwd' as x %}",
        "{{ tick.__globals__.x }}",
    ],
)
def test_templates_run_in_a_sandbox(make, source):
    messages = [dict(HELLO)]
    with pytest.raises(UserError, match="the chat template cannot write messages"):
        make(source).tokens(messages)
    assert messages == [HELLO]


LOOP = "{% set r = range(99999) %}{% for a in r %}"
ASSIGN = (
    "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)
BRANCH = "{% macro f(n) %}{% for i in [1, 2] %}{{ f(n - 1) if n }}{% endfor %}{% endmacro %}"
DOUBLE = "{% macro f(x, n) %}{{ f(x ~ x, n - 1) if n }}{% endmacro %}{{ f('x', 60) }}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LOOP + "{% for b in r %}{% endfor %}{% endfor %}", "takes longer than 0.2 seconds"),
        (LOOP + "{% set r = range(99999) | list %}{% endfor %}", "takes longer than 0.2 seconds"),
        (BRANCH + "{{ f(60) }}", "takes longer than 0.2 seconds"),
        (LOOP + "{{ messages[0].content }}{% endfor %}", "writes more than 5,000 characters"),
        ("{{ 'x' * 10000 }}", "writes more than 5,000 characters"),
        ("{{ 10000 * 'x' }}", "writes more than 5,000 characters"),
        ("{{ ['x'] * 10000 }}", "writes more than 5,000 characters"),
        (ASSIGN, "writes more than 5,000 characters"),
        (DOUBLE, "writes more than 5,000 characters"),
        ("{{ 10 ** 10000000 }}", "computes a power of more than"),
        ("{{ 2 ** 4000 ** 100 }}", "computes a power of more than"),
        ("{{ (-9) ** 9999 }}", "computes a power of more than"),
    ],
)
def test_a_runaway_template_is_stopped(make, monkeypatch, source, message):
    monkeypatch.setattr(dialect, "MOST_CHARS", 5000)
    if "seconds" in message:
        monkeypatch.setattr(dialect, "MOST_SECONDS", 0.2)
    with pytest.raises(UserError, match=message):
        make(source).tokens([HELLO])


class Control:
    """A tokenizer of characters and any number of control tokens."""

    bos_id = eos_id = -1

    def __init__(self, count):
        self.start_ids, self.texts, self.names = [], [], {f"<|{i}|>": i for i in range(count)}

    def control_tokens(self):
        return self.names

    def encode(self, text):
        self.texts.append(text)
        return [-ord(character) for character in text]


@pytest.mark.parametrize("count", [0, 1, 3000])
def test_any_number_of_control_tokens(tmp_path, count):
    """Text between two of them is encoded at once."""
    tokenizer, written = Control(count), [*range(count)] * 2
    marks = "a<|1|>b" + "".join(f"<|{i}|>x<|0|>{i}" for i in written)
    (tmp_path / "chat_template.jinja").write_text(marks + "{{ messages[0].content }}")
    template, messages = ChatTemplate(tmp_path, tokenizer), [{"content": "<|0|> <|1|>"}]
    tokens, num_texts = template.tokens(messages), len(tokenizer.texts)
    parts = re.split(r"(<\|\d+\|>)", marks)
    names = tokenizer.names
    expected = [[names[part]] if part in names else tokenizer.encode(part) for part in parts]
    assert tokens == [*chain(*expected), *tokenizer.encode("<|0|> <|1|>")]
    assert num_texts <= 1 + sum(part in names for part in parts)
    assert template.text(messages) == marks + "<|0|> <|1|>"


def test_small_powers_are_computed(make):
    assert make("{{ 2 ** 10 }} {{ 2 ** -1 }} {{ 2.0 ** 3 }}").text([HELLO]) == "1024 0.5 8.0"


@pytest.mark.parametrize(
    "source", ["{% for", "{% break %}", "{{ x | nothing }}", "{% generation %}", "{% else %}"]
)
def test_a_template_that_cannot_be_compiled_is_refused_with_the_line(make, source):
    with pytest.raises(UserError, match=r"chat_template\.jinja.*: .* cannot be compiled: "):
        make(f"x\n{source}")


def test_templates_of_tokenizer_config(tmp_path, code_tokenizer):
    def text(chat_template):
        config = {"chat_template": chat_template, "bos_token": "<s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return ChatTemplate(tmp_path, code_tokenizer).text([HELLO])

    plain = "user:  Hello\n\n\nassistant:"
    assert ChatTemplate(tmp_path, code_tokenizer).text([HELLO]) == plain
    assert text("{{ messages[0].role }}") == "user"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    assert text(named) == "y"
    assert text(None) == plain
    for wrong, message in (
        (named[:1], 'it has templates named "tool_use", name one "default"'),
        (5, "chat_template=5 is not allowed: it must be a string"),
    ):
        with pytest.raises(UserError, match=message):
            text(wrong)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        ChatTemplate(tmp_path, code_tokenizer)
    (tmp_path / "chat_template.jinja").write_text("z")
    assert ChatTemplate(tmp_path, code_tokenizer).text([HELLO]) == "z"


@pytest.mark.parametrize("name", ["messages", "tools", "bos_token", "raise_exception", "namespace"])
def test_variables_of_the_server_cannot_be_set(make, name):
    refusal = rf"chat_template_kwargs\.{name} is not allowed: the serv"
    with pytest.raises(UserError, match=refusal):
        make("x").tokens([HELLO], {name: 1})


MARKED = """{{ bos_token }}{% for m in messages %}<{{ m.role }}>
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}

{% else %}{{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>
{% endif %}"""
CHATML = """{% for m in messages %}
{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
AGAIN = [SYSTEM, HELLO, ANSWER, GO, {"role": "assistant", "content": " Ja, größer."}]


def test_answers_between_marks_are_those_of_transformers(make, code_tokenizer):
    for messages in (AGAIN, AGAIN[1:3]):
        text, spans = render_jinja_template(
            [messages],
            chat_template=MARKED,
            return_assistant_tokens_mask=True,
            bos_token="<s>",
            eos_token="</s>",
        )
        tokens, counted = make(MARKED).conversation(messages)
        encode, eos = code_tokenizer.encode, code_tokenizer.eos_id
        expected = [[*encode(text[0][a:b].removesuffix("</s>")), eos] for a, b in spans[0]]
        assert list(chain(*expected)) == [t for t, own in zip(tokens, counted, strict=True) if own]
        plain = "".join(text).replace("<s>", "").replace("</s>", "")
        assert code_tokenizer.decode(tokens) == plain
        assert tokens[0] == code_tokenizer.bos_id
        assert not counted[0]


@pytest.mark.parametrize(
    ("source", "answers"),
    [
        (None, ["{0}</s>", "{1}</s>"]),
        (CHATML, ["{0}<|im_end|>\n", "{1}<|im_end|>\n"]),
        (MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", ""), ["{0}</s>"]),
        ("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
         "{% if add_generation_prompt %}assistant:{% endif %}", ["{0};", "{1};"]),
    ],
)  # fmt: skip
def test_answers_follow_their_prompts(make, tmp_path, code_tokenizer, source, answers):
    messages = AGAIN if len(answers) == 2 else AGAIN[:3]
    template = make(source) if source else ChatTemplate(tmp_path, code_tokenizer, TUNED)
    tokens, counted = template.conversation(messages)
    texts = [m["content"] for m in messages if m["role"] == "assistant"]
    eos = code_tokenizer.eos_id
    spans = [[]]
    for token, own, before in zip(tokens, counted, [False, *counted], strict=False):
        if own and not before:
            spans.append([])
        if own:
            spans[-1].append(token)
    for span, answer in zip(spans[1:], answers, strict=True):
        text = answer.format(*texts)
        own = text.removesuffix("</s>")
        assert span == code_tokenizer.encode(own) + [eos] * (own != text)
    # The tokens before the first answer are those of its prompt.
    first = next(number for number, m in enumerate(messages) if m["role"] == "assistant")
    assert tokens[: counted.index(True)] == template.tokens(messages[:first])


def test_a_template_without_marks_must_write_answers_after_their_prompts(make):
    forgets = """{% for m in messages %}{% if m.role != 'assistant' or loop.last %}
    {{- m.content }}{% endif %}{% endfor %}"""
    with pytest.raises(UserError, match=r"message 3: .* put what is trained on in {% generation"):
        make(forgets).conversation(AGAIN)
    with pytest.raises(UserError, match="no text of an assistant"):
        make(MARKED).conversation([SYSTEM, HELLO])
    nested = MARKED.replace("{{ m.content }}{{", "{% generation %}{{ m.content }}"
                            "{% endgeneration %}{{")  # fmt: skip
    assert make(nested).conversation(AGAIN) == make(MARKED).conversation(AGAIN)


def test_marks_of_answers_do_not_change_a_prompt(make):
    without = MARKED.replace("{% generation", "{% if true").replace("endgeneration", "endif")
    assert make(MARKED).text(AGAIN) == make(without).text(AGAIN)
    assert make(MARKED).tokens(AGAIN) == make(without).tokens(AGAIN)
