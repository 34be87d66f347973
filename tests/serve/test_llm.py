"""`LLM`: prompts decoded from Python."""

import sys

import pytest

from serve import LLM, Request, SamplingParams
from serve.prompts import derived_seed
from stu.common.errors import UserError
from tests.serve.requests import decode

PROMPTS = ["def f(", "", [1, 100, 101], "return x"]


@pytest.fixture(scope="module")
def llm(model_directory):
    return LLM(model_directory, "cpu", cache_gib=0.01, max_running=3)


def test_completions_equal_those_of_each_prompt_alone(llm, code_model, code_tokenizer, capsys):
    """In the order of the prompts, with seeds derived from their positions."""
    params = SamplingParams(temperature=1.0, max_new_tokens=12, n=2, seed=3, logprobs=1)
    results = llm.generate(PROMPTS, params)
    assert [result.prompt for result in results] == ["def f(", "", None, "return x"]
    assert "8/8" in capsys.readouterr().err
    completions = [completion for result in results for completion in result.outputs]
    ids = [result.prompt_token_ids for result in results for _ in range(2)]
    for index, (tokens, completion) in enumerate(zip(ids, completions, strict=True)):
        seed = derived_seed(3, index) if index else 3
        own = SamplingParams(temperature=1.0, max_new_tokens=12, seed=seed)
        (alone,) = decode(code_model, code_tokenizer, [Request(tokens, own)])
        assert (completion.text, completion.finish_reason) == (alone.text, alone.finish_reason)
        assert [item.token for item in completion.logprobs] == list(completion.token_ids)
    assert len({completion.text for completion in completions}) > 4


def test_each_prompt_may_have_its_own_sampling_params(llm, capsys):
    params = [SamplingParams(max_new_tokens=count, stop_at_eos=False) for count in (0, 3, 1, 5)]
    results = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [len(result.outputs[0].token_ids) for result in results] == [0, 3, 1, 5]
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="2 sampling_params for 4 prompts"):
        llm.generate(PROMPTS, params[:2])


def test_prompt_without_sampling_params_takes_the_model_defaults(llm, code_tokenizer):
    assert llm.default_sampling_params.max_new_tokens == 9
    (text,), (ids,) = llm.generate("def f("), llm.generate(code_tokenizer.encode_prompt("def f("))
    assert text.outputs == ids.outputs
    assert llm.generate([]) == []


def test_refused_prompt_leaves_no_request_behind(llm):
    with pytest.raises(UserError, match="maximum context length is 64") as found:
        llm.generate(["x", [1] * 63, "y"])
    assert found.value.field == "prompt"
    (before,) = llm.generate(["x"], use_tqdm=False)
    assert llm.generate(["x"], use_tqdm=False) == [before]


def test_chat_renders_the_template(llm, code_tokenizer):
    messages = [{"role": "user", "content": "f?"}]
    (answer,) = llm.chat(messages, SamplingParams(max_new_tokens=3))
    assert code_tokenizer.decode(answer.prompt_token_ids) == "user: f?\n\nassistant:"
    assert [answer, answer] == llm.chat([messages, messages], SamplingParams(max_new_tokens=3))


def test_chat_without_jinja2_names_the_extra_to_install(llm, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for name in ("chat_dialect", "chat_template"):
        monkeypatch.delitem(sys.modules, f"serve.openai.{name}", raising=False)
    with pytest.raises(UserError, match=r'jinja2 is not installed: pip install "stu\[serve\]"'):
        llm.chat([{"role": "user", "content": "f?"}])
