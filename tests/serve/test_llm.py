"""`LLM`: prompts decoded, scored and embedded from Python."""

import math
import os
import signal
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from serve import LLM, Request, SamplingParams
from serve.devices import memory_checked
from serve.prompts import derived_seed
from stu.common.errors import UserError
from stu.model import FlashSTU
from stu.model_dir import save_model
from tests.serve.adapters.adapter_folders import write_adapter
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


def test_completions_are_the_same_where_the_host_overlaps_with_the_device(llm, model_directory):
    overlapping = LLM(model_directory, "cpu", cache_gib=0.01, max_running=3, overlap=True)
    params = SamplingParams(temperature=1.0, max_new_tokens=20, n=3, seed=3, stop=["e", "("])
    expected, found = (
        [result.outputs for result in own.generate(PROMPTS, params, use_tqdm=False)]
        for own in (llm, overlapping)
    )
    assert found == expected


def test_each_prompt_may_have_its_own_sampling_params(llm, capsys):
    params = [SamplingParams(max_new_tokens=count, stop_at_eos=False) for count in (0, 3, 1, 5)]
    results = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [len(result.outputs[0].token_ids) for result in results] == [0, 3, 1, 5]
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="2 sampling_params for 4 prompts"):
        llm.generate(PROMPTS, params[:2])
    with pytest.raises(UserError, match="0 sampling_params for 4 prompts"):
        llm.generate(PROMPTS, [])


def test_the_best_of_several_completions(llm):
    """They have the largest sums of log probabilities, which are not reported unasked."""
    params = SamplingParams(temperature=1.0, max_new_tokens=12, seed=3, n=2, best_of=5)
    params = replace(params, stop_at_eos=False)
    each = llm.generate(PROMPTS, replace(params, n=5, best_of=None, logprobs=0))
    for asks in (False, True):
        own = replace(params, logprobs=0) if asks else params
        for found, several in zip(llm.generate(PROMPTS, own), each, strict=True):
            best = sorted(several.outputs, key=lambda output: -sum_of(output))[:2]
            assert [output.text for output in found.outputs] == [output.text for output in best]
            sums = [output.cumulative_logprob for output in found.outputs]
            assert sums == pytest.approx([sum_of(output) for output in best])
            assert all(bool(output.logprobs) == asks for output in found.outputs)
    with pytest.raises(UserError, match="n=5 is not allowed: it must be 1, without best_of"):
        llm._engine.add(Request([1], params))


def sum_of(completion):
    assert completion.finish_reason == "length"
    return sum(token.logprob for token in completion.logprobs)


def test_prompts_with_a_lower_priority_number_run_first(model_directory, monkeypatch):
    llm, ended = LLM(model_directory, "cpu", cache_gib=0.01, max_running=1), []
    step = llm._engine.step

    def noted_step():
        outputs = step()
        ended.extend(output.request_id for output in outputs if output.finish_reason)
        return outputs

    params = SamplingParams(max_new_tokens=3, temperature=1.0, stop_at_eos=False)
    expected = llm.generate(PROMPTS, params, use_tqdm=False)
    monkeypatch.setattr(llm._engine, "step", noted_step)
    found = llm.generate(PROMPTS, params, use_tqdm=False, priority=[2, -1, 0, 2])
    assert [result.outputs for result in found] == [result.outputs for result in expected]
    assert [number % 4 for number in ended] == [1, 2, 0, 3]
    for wrong, message in (([1], "1 priority for 4"), ([0, 0, 0, True], "priority=true is not")):
        with pytest.raises(UserError, match=message):
            llm.generate(PROMPTS, params, priority=wrong)


def test_prompt_without_sampling_params_takes_the_model_defaults(llm, code_tokenizer):
    assert llm.default_sampling_params.max_new_tokens == 9
    (text,), (ids,) = llm.generate("def f("), llm.generate(code_tokenizer.encode_prompt("def f("))
    assert text.outputs == ids.outputs
    assert llm.generate([]) == []


def test_devices_of_torch_and_numbers_are_devices(model_directory):
    llm = LLM(model_directory, torch.device("cpu"), cache_gib=0.01)
    assert llm.generate("x", SamplingParams(max_new_tokens=1))
    for device in (7, torch.device("cuda:7")):
        with pytest.raises(UserError, match=r"device=.*7.* is not allowed: torch sees"):
            LLM(model_directory, device)


def test_memory_that_a_cpu_does_not_have_is_named():
    with pytest.raises(UserError, match="out of memory: lower one of"), memory_checked():
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="shape"), memory_checked():
        torch.empty(2) @ torch.empty(3, 4)


def test_refused_prompt_leaves_no_request_behind(llm):
    with pytest.raises(UserError, match="maximum context length is 64") as found:
        llm.generate(["x", [1] * 63, "y"])
    assert found.value.field == "prompt"
    (before,) = llm.generate(["x"], use_tqdm=False)
    assert llm.generate(["x"], use_tqdm=False) == [before]


def test_ctrl_c_ends_the_requests_after_their_step(model_directory):
    """A step that ends between its layers would leave wrong states to later requests."""
    llm = LLM(model_directory, "cpu", cache_gib=0.01, speculate="ngram")
    params = SamplingParams(max_new_tokens=20, stop_at_eos=False)
    prompts = [[5, 6, 7, 8] * 10, [9, 3] * 12]
    expected = llm.generate(prompts, params, use_tqdm=False)
    calls = Counter()
    first, *_, last = llm._engine._runner._model.blocks

    def press(*_):
        calls["first"] += 1
        if calls["first"] in (1, 5):
            os.kill(os.getpid(), signal.SIGINT)

    first.register_forward_hook(press)
    last.register_forward_hook(lambda *_: calls.update(["last"]))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, params, use_tqdm=False)
        assert calls["first"] == calls["last"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        llm._engine.check_integrity()
        assert llm._engine.stats().running == llm._engine.stats().waiting == 0
    assert llm.generate(prompts, params, use_tqdm=False) == expected


def test_a_second_ctrl_c_waits_for_no_step(model_directory):
    llm = LLM(model_directory, "cpu", cache_gib=0.01)
    ended = []

    def press(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    first, *_, last = llm._engine._runner._model.blocks
    with (
        first.register_forward_hook(press),
        last.register_forward_hook(lambda *_: ended.append(True)),
        pytest.raises(KeyboardInterrupt),
    ):
        llm.generate("a", use_tqdm=False)
    assert not ended
    with pytest.raises(RuntimeError, match="half done: make another"):
        llm.generate("a", use_tqdm=False)


def test_chat_renders_the_template(llm, code_tokenizer):
    messages = [{"role": "user", "content": "f?"}]
    (answer,) = llm.chat(messages, SamplingParams(max_new_tokens=3))
    assert code_tokenizer.decode(answer.prompt_token_ids) == "user: f?\n\nassistant:"
    assert [answer, answer] == llm.chat([messages, messages], SamplingParams(max_new_tokens=3))


def test_chat_without_jinja2_names_the_extra_to_install(llm, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for name in ("dialect", "template"):
        monkeypatch.delitem(sys.modules, f"stu.chat.{name}", raising=False)
    with pytest.raises(UserError, match=r"jinja2 is not installed: run pip install '\.\[serve\]'"):
        llm.chat([{"role": "user", "content": "f?"}])


def logprobs_of(model, tokens):
    """Return the log probability of each token but the first, by the full forward pass."""
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens]))[0].double().log_softmax(-1)
    return [logprobs[at, token].item() for at, token in enumerate(tokens[1:])]


def test_scores_equal_the_forward_pass(llm, code_model, code_tokenizer, capsys):
    prompts = ["größe f(x)", "", [1, 100, 101], [5]]
    scores = llm.score(prompts)
    assert "4/4" in capsys.readouterr().err
    encoded = [code_tokenizer.encode_prompt(text) for text in prompts[:2]] + prompts[2:]
    num_bytes = [len("größe f(x)".encode()), 0, len(code_tokenizer.decode([100, 101]).encode()), 0]
    for score, tokens, count in zip(scores, encoded, num_bytes, strict=True):
        expected = logprobs_of(code_model, tokens)
        assert score.logprob == pytest.approx(sum(expected), abs=1e-4)
        assert (score.num_tokens, score.num_bytes) == (len(expected), count)
        if expected:
            assert score.perplexity == pytest.approx(math.exp(-sum(expected) / len(expected)))
            bits = -sum(expected) / math.log(2) / count
            assert score.bits_per_byte == pytest.approx(bits, rel=1e-5)
        else:
            assert score.logprob == 0
            assert score.perplexity is score.bits_per_byte is None
    assert llm.score([]) == []


def test_completions_are_scored_after_their_prompts(llm, code_model, code_tokenizer, capsys):
    encode = code_tokenizer.encode_prompt
    completions = ["def f(", [100, 7], ""]
    scores = llm.score(["def", "", "x"], completions, use_tqdm=False)
    assert capsys.readouterr().err == ""
    ids = [code_tokenizer.encode("def f("), [100, 7], []]
    for prompt, completion, score in zip(
        [*map(encode, ("def", "", "x"))], ids, scores, strict=True
    ):
        expected = logprobs_of(code_model, prompt + completion)[len(prompt) - 1 :]
        assert score.logprob == pytest.approx(sum(expected), abs=1e-4)
        assert score.num_tokens == len(completion)
    params = SamplingParams(max_new_tokens=4, logprobs=0, temperature=1.0)
    (result,) = llm.generate("return", params)
    generated = result.outputs[0]
    (score,) = llm.score("return", generated.token_ids)
    assert score.logprob == pytest.approx(sum(t.logprob for t in generated.logprobs), abs=1e-4)


def test_embeddings_equal_the_forward_pass(llm, code_model, code_tokenizer, capsys):
    for pooling in ("mean", "last"):
        whole = llm.embed(PROMPTS, pooling, normalize=False)
        assert "4/4" in capsys.readouterr().err
        unit = llm.embed(PROMPTS, pooling, use_tqdm=False)
        assert capsys.readouterr().err == ""
        for prompt, found, of_unit in zip(PROMPTS, whole, unit, strict=True):
            tokens = code_tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
            with torch.no_grad():
                hidden = code_model.hidden(torch.tensor([tokens]))[0].double()
            expected = hidden.mean(0) if pooling == "mean" else hidden[-1]
            assert found.embedding == pytest.approx(expected.tolist(), abs=1e-5)
            assert of_unit.embedding == pytest.approx(
                (expected / expected.norm()).tolist(), abs=1e-5
            )
            assert math.hypot(*of_unit.embedding) == pytest.approx(1, abs=1e-12)
            assert list(found.prompt_token_ids) == tokens
            assert found.prompt == (prompt if isinstance(prompt, str) else None)
    assert llm.embed("x")[0] == llm.embed(["x"])[0]
    assert llm.embed([]) == []


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda llm: llm.score(["x"] * 3, ["y"] * 2), "2 completions for 3 prompts: give one"),
        (lambda llm: llm.score(["x"], [5.5]), "completion=5.5 is not allowed: it must be a string"),
        (lambda llm: llm.score([[1, 999]]), "prompt is not allowed: it has the id 999"),
        (lambda llm: llm.score(["x" * 65]), "maximum context length is 64"),
        (lambda llm: llm.embed("x", "max"), 'pooling="max" is not allowed: it must be mean or'),
    ],
)
def test_scores_and_embeddings_that_cannot_be_computed_are_refused(llm, ask, message):
    with pytest.raises(UserError, match=message):
        ask(llm)


def test_damaged_model_has_no_scores_and_embeddings(tmp_path, code_model, code_tokenizer):
    model = FlashSTU(replace(code_model.config))
    with torch.no_grad():
        model.norm.weight[3] = math.nan
    save_model(tmp_path / "model", model, code_tokenizer)
    llm = LLM(tmp_path / "model", "cpu", cache_gib=0.01)
    for compute in (llm.score, llm.embed):
        with pytest.raises(UserError, match="not finite: its weights are damaged"):
            compute("x")


def test_prompts_have_adapters(llm, model_directory, code_model, code_tokenizer, tmp_path):
    merged = write_adapter(tmp_path / "own", code_model)
    save_model(tmp_path / "merged", merged, code_tokenizer)
    own = LLM(model_directory, "cpu", cache_gib=0.01, lora_modules={"own": tmp_path / "own"})
    expected = llm, LLM(tmp_path / "merged", "cpu", cache_gib=0.01)
    prompts, names = ["def f("] * 2, [None, "own"]
    params = SamplingParams(max_new_tokens=5, stop_at_eos=False)
    found = own.generate(prompts, params, use_tqdm=False, lora_request=names)
    alone = [other.generate(prompts[0], params, use_tqdm=False)[0] for other in expected]
    assert [answer.outputs for answer in found] == [answer.outputs for answer in alone]
    assert found[0].outputs != found[1].outputs
    (answer,) = own.generate(prompts[0], params, use_tqdm=False, lora_request="own")
    assert answer.outputs == alone[1].outputs
    chat = [{"role": "user", "content": "x"}]
    answers = own.chat([chat, chat], params, use_tqdm=False, lora_request=names)
    assert [answer.outputs for answer in answers] == [
        other.chat(chat, params, use_tqdm=False)[0].outputs for other in expected
    ]
    scores = own.score(prompts, use_tqdm=False, lora_request=names)
    embeddings = own.embed(prompts, use_tqdm=False, lora_request=names)
    for other, score, embedding in zip(expected, scores, embeddings, strict=True):
        (same,) = other.score(prompts[0], use_tqdm=False)
        assert score.logprob == pytest.approx(same.logprob, abs=1e-4)
        (vector,) = other.embed(prompts[0], use_tqdm=False)
        assert embedding.embedding == pytest.approx(vector.embedding, abs=1e-4)
    assert scores[0].logprob != scores[1].logprob
    for lora_request, message in (
        ("other", 'lora_request="other" .* one of own'),
        (["own"], "1 lora_request for 2 prompts"),
        (object(), "lora_request=.* the name of an adapter, or a list"),
        ([["own"], None], "lora_request=.* one of own"),
        (["", "own"], 'lora_request="" .* one of own'),
    ):
        with pytest.raises(UserError, match=message):
            own.generate(prompts, params, lora_request=lora_request)
    with pytest.raises(UserError, match="no lora_modules"):
        llm.embed(prompts, lora_request="own")


@pytest.mark.parametrize(
    ("lora_modules", "message"),
    [
        ({"own": "x"}, "tensor_parallel=2 .* 1 with lora_modules"),
        ({"": "x"}, "lora_modules=.* none of them empty"),
        ({7: "x"}, "lora_modules="),
        ({"own": None}, "lora_modules="),
        (["x"], "lora_modules="),
    ],
    ids=str,
)
def test_adapters_are_checked_first(model_directory, lora_modules, message):
    with pytest.raises(UserError, match=message):
        LLM(model_directory, "cpu", tensor_parallel=2, lora_modules=lora_modules)
    with pytest.raises(UserError, match=r"lora_modules=|tensor_parallel=null .* whole number"):
        LLM(model_directory, "cpu", tensor_parallel=None, lora_modules=lora_modules)
