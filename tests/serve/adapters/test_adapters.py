"""Adapters in one batch, against models that have them merged."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.adapters.folder import read_adapter
from serve.completion import CompletionBuilder
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.sampling.ngrams import Ngrams
from stu.common.errors import UserError
from tests.serve.adapters.adapter_folders import PREFIX, write_adapter
from tests.serve.requests import decode, make_request

NAMES = "", "wide", "narrow"


@pytest.fixture(scope="module")
def merged(tmp_path_factory, code_model):
    """The models with adapters merged, by name, and the adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    models = {
        "": code_model,
        "wide": write_adapter(folder / "wide", code_model, rank=5, seed=1),
        "narrow": write_adapter(
            folder / "narrow", code_model, 2, 3.0, seed=2, only=("gate", "down", "output")
        ),
    }
    return models, [read_adapter(name, folder / name, code_model.config) for name in NAMES[1:]]


def completions(engine, requests):
    builders = {engine.add(request): CompletionBuilder() for request in requests}
    while engine.has_work:
        for output in engine.step():
            builders[output.request_id].add(output)
        engine.check_integrity()
    return [builder.completion() for builder in builders.values()]


@pytest.mark.parametrize(
    ("static", "settings"),
    [
        (False, {}),
        (True, {"prompt_tokens_per_step": 24}),
        (True, {"batch_invariant": True}),
        pytest.param(False, {"batch_invariant": True}, marks=pytest.mark.slow),
        (False, {"convolution_cache": "pages", "page_len": 4, "prompt_tokens_per_step": 10}),
    ],
)
def test_rows_decode_as_models_with_their_adapters_merged(merged, code_tokenizer, static, settings):
    models, adapters = merged
    rng = random.Random(0)
    requests = []
    for number in range(24):
        prompt = [rng.randrange(code_tokenizer.vocab_size) for _ in range(rng.randrange(1, 45))]
        own = {"adapter": rng.choice(NAMES), "logprobs": 2, "prompt_logprobs": 1}
        requests.append(make_request(prompt, rng.randrange(1, 10), seed=number, **own))
    config = EngineConfig(cache_gib=0.01, max_running=7, **settings)
    engine = Engine(models[""], code_tokenizer, config, static, adapters)
    found = completions(engine, requests)
    for name, model in models.items():
        places = [i for i, request in enumerate(requests) if request.adapter == name]
        alone = [make_without(requests[i]) for i in places]
        for place, expected in zip(places, decode(model, code_tokenizer, alone), strict=True):
            assert list(found[place].token_ids) == list(expected.token_ids), (name, place)
            for kind in ("logprobs", "prompt_logprobs"):
                pairs = zip(getattr(found[place], kind), getattr(expected, kind), strict=True)
                for one, other in pairs:
                    assert one.logprob == pytest.approx(other.logprob, abs=2e-4)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_guesses_are_confirmed_by_each_row_with_its_adapter(
    merged, code_tokenizer, batch_invariant, monkeypatch
):
    """In groups of eight tokens, of rows with other adapters and of padding."""
    models, adapters = merged
    texts = {}
    for name, model in models.items():
        (own,) = decode(model, code_tokenizer, [make_request([5, 6, 7], 20)])
        texts[name] = list(own.token_ids)

    def guess(ngrams, most):
        tokens = ngrams._tokens[3 : len(ngrams)].tolist()
        text = next(text for text in texts.values() if text[: len(tokens)] == tokens)
        return [*text[len(tokens) :][: most - 1], 9][:most] if most > 0 else []

    monkeypatch.setattr(Ngrams, "guess", guess)
    values = {"batch_invariant": batch_invariant, "speculate": "ngram"}
    config = EngineConfig(cache_gib=0.01, max_running=3, **values)
    engine = Engine(models[""], code_tokenizer, config, False, adapters)
    found = completions(engine, [make_request([5, 6, 7], 20, adapter=name) for name in NAMES])
    assert [list(own.token_ids) for own in found] == list(texts.values())
    assert engine.stats().spec_decode_num_accepted_tokens > 20


def make_without(request):
    sampling = request.sampling
    return make_request(request.prompt_token_ids, sampling.max_new_tokens, sampling)


def test_remembered_prefixes_are_those_of_the_same_adapter(merged, code_tokenizer):
    models, adapters = merged
    long = [1 + i % 50 for i in range(55)]
    config = EngineConfig(cache_gib=0.05, max_running=2, prefix_cache_gib=0.02)
    engine = Engine(models[""], code_tokenizer, config, False, adapters)
    for prompt in (long[:45], long):
        for name in NAMES:
            found = CompletionBuilder()
            engine.add(make_request(prompt, 6, adapter=name))
            while engine.has_work:
                for output in engine.step():
                    found.add(output)
            (expected,) = decode(models[name], code_tokenizer, [make_request(prompt, 6)])
            assert found.completion().token_ids == expected.token_ids
            assert found.cached_tokens == (0 if len(prompt) == 45 else 45)


def test_a_name_that_no_adapter_has_is_refused(merged, code_tokenizer):
    models, adapters = merged
    engine = Engine(models[""], code_tokenizer, EngineConfig(cache_gib=0.01), None, adapters)
    with pytest.raises(UserError, match='adapter="other" is not allowed: it must be one of wide'):
        engine.add(make_request([1], 1, adapter="other"))
    engine = Engine(models[""], code_tokenizer, EngineConfig(cache_gib=0.01))
    with pytest.raises(UserError, match="none, as there are no adapters"):
        engine.add(make_request([1], 1, adapter="wide"))


def test_weights_of_8_bits_leave_adapters_as_they_are(merged, code_tokenizer):
    """Rows without an adapter decode as without any, and others differ from them."""
    models, adapters = merged
    prompts = [[3, 1, 4], [1, 5, 9, 2]]
    config = EngineConfig(cache_gib=0.01, weights="int8")
    engine = Engine(models[""], code_tokenizer, config, None, adapters)
    plain = [make_request(prompt, 8) for prompt in prompts]
    adapted = [make_request(prompt, 8, adapter="wide") for prompt in prompts]
    found = [own.token_ids for own in completions(engine, [*plain, *adapted])]
    expected = [own.token_ids for own in decode(models[""], code_tokenizer, plain, weights="int8")]
    assert found[:2] == expected
    assert found[2:] != expected


def spoil_config(**values):
    def spoil(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


def spoil_tensors(change):
    def spoil(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return spoil


FIRST = f"{PREFIX}blocks.0.mlp.gate"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "no such file; is"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
        (spoil_config(peft_type="IA3"), '"peft_type": "LORA"'),
        (spoil_config(r=0), "r=0 is not a number from 1"),
        (spoil_config(lora_alpha="8"), "lora_alpha="),
        (spoil_config(use_dora=True), "use_dora=true is not supported"),
        (spoil_config(modules_to_save=["norm"]), "modules_to_save="),
        (spoil_config(alpha_pattern={"gate": 3}), "alpha_pattern="),
        (spoil_config(alora_invocation_tokens=[5]), "alora_invocation_tokens="),
        (spoil_config(r=4), "has rank 3, and adapter_config.json says r=4"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "safetensors file"),
        (spoil_tensors(lambda t: t.clear()), "it has no tensors"),
        (spoil_tensors(lambda t: t.pop(f"{FIRST}.lora_B.weight")), "only one of lora_A and"),
        (spoil_tensors(lambda t: t.update({"norm.weight": torch.ones(3)})), "no part of an ada"),
        (
            spoil_tensors(lambda t: t.update({f"{FIRST}.lora_A.weight": torch.ones(3, 9)})),
            r"blocks.0.mlp.gate has lora_A \(3, 9\)",
        ),
        (
            spoil_tensors(
                lambda t: t.update({f"{FIRST}.lora_A.weight": torch.full((3, 16), torch.nan)})
            ),
            "not finite",
        ),
        (
            spoil_tensors(
                lambda t: t.update({"blocks.0.mixer.x.lora_A.weight": torch.ones(3, 16)})
            ),
            "no linear layer blocks.0.mixer.x",
        ),
    ],
)
def test_folders_that_cannot_be_used_are_refused_by_name(tmp_path, code_model, spoil, message):
    write_adapter(tmp_path / "own", code_model)
    spoil(tmp_path / "own")
    with pytest.raises(UserError, match=message) as error:
        read_adapter("own", tmp_path / "own", code_model.config)
    assert "adapter_" in str(error.value)


def test_scale_of_rank_stabilised_adapters(tmp_path, code_model):
    write_adapter(tmp_path / "own", code_model, rank=4, alpha=6.0, use_rslora=True)
    assert read_adapter("own", tmp_path / "own", code_model.config).scale == 3.0
