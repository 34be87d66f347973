"""Folders for transformers: the same logits and tokens in a process that cannot import stu."""

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import sentencepiece
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from serve import LLM, SamplingParams
from stu.chat.template import find_template
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.filters import spectral_filters
from stu.layouts import MIXERS
from stu.model import FlashSTU
from stu.model_dir import load_generation, load_model, load_tokenizer, save_model
from stu.realisation import fitting_realisation
from stu.tokenizer import make_tokenizer, read_tokenizer
from tests.stu.tokenizers.vocabularies import KINDS, make, texts
from train.checkpoint import export, generation_config, import_published, transformers_folder
from train.checkpoint.folder import CheckpointFolder
from train.checkpoint.hugging_face.memory_stu import LayerMemory, Realisation
from train.checkpoint.hugging_face.tokenizer_json import NotExact, tokenizer_json

SHAPE = {"vocab_size": 280, "width": 24, "num_layers": 3, "num_heads": 3, "mlp_ratio": 2}
SHAPE |= {"num_filters": 6, "max_seq_len": 150, "window_tokens": 9, "softcap": 3.0}
KINDS_OF_MODELS = {
    "hybrid": {"layout": "hybrid"},
    "full": {"layout": "stu", "stu_form": "full"},
    "hyena": {"layout": "hyena"},
    "no_state": {"layout": "stu"},
    "plain": {"layout": "hyena", "blocks": "plain", "filter_bands": 2, "filter_floor": 0.05},
}
QUICK, SLOW = ["hybrid"], ["hyena", "full", "no_state", "plain"]
PROMPTS = ["def f(x):\n\treturn", "  x", "return x + 1\nélève 👩‍👩‍👧 "]
NEW_TOKENS = 64
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

WITHOUT_STU = """
import json, os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("stu", "train", "serve"):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocker())
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
root, names = sys.argv[1], sys.argv[2:]
chat = [{"role": "user", "content": "hello"}]
for name in names:
    folder = os.path.join(root, name, "theirs")
    wanted = torch.load(os.path.join(root, name, "wanted.pt"), weights_only=True)
    load = AutoModelForCausalLM.from_pretrained
    model = load(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert not model.training and model.dtype == torch.float32, name
    if model.model.filters is not None:  # hooks that move tensors between devices run at calls
        calls = []
        hook = model.model.filters.register_forward_hook(lambda *_: calls.append(name))
        model(wanted["tokens"], use_cache=True)
        assert len(calls) == (1 if name == "no_state" else 2), name
        hook.remove()
    with torch.no_grad():
        logits = model(wanted["tokens"]).logits
        error = 1e-5 * wanted["logits"].abs().max()
        assert torch.allclose(logits, wanted["logits"], rtol=0, atol=error), name
        # In pieces, with a cache.
        outputs, cache = [], None
        for piece in wanted["tokens"].split([1, 30, 1, 2, 7, 59], dim=1):
            output = model(piece, cache=cache, use_cache=True)
            cache = output.cache
            outputs.append(output.logits)
        assert torch.allclose(torch.cat(outputs, 1), wanted["logits"], rtol=0, atol=error), name
        assert cache.get_seq_length() == 100
        # A row with 7 tokens of padding, and one without.
        tokens = torch.stack([wanted["tokens"][0, :47].roll(7), wanted["tokens"][1, :47]])
        mask = torch.ones_like(tokens)
        mask[0, :7] = 0
        first = model(tokens[:, :20], attention_mask=mask[:, :20], use_cache=True)
        rest = model(tokens[:, 20:], attention_mask=mask, cache=first.cache).logits
        padded = torch.cat([first.logits, rest], 1)
        for found, right in [(padded[0, 7:], logits[0, :40]), (padded[1], logits[1, :47])]:
            assert torch.allclose(found, right, rtol=0, atol=error), name
    greedy = {"max_new_tokens": 64, "do_sample": False}
    for text, ids, new in zip(wanted["texts"], wanted["prompts"], wanted["new"]):
        inputs = tokenizer(text, return_tensors="pt")
        assert inputs.input_ids[0].tolist() == ids, (name, text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text, (name, text)
        (out,) = model.generate(**inputs, **greedy)
        assert out[len(ids):].tolist() == new, (name, text)
    batch = tokenizer(wanted["texts"], return_tensors="pt", padding=True)
    assert (batch.attention_mask[:, 0] == 0).any()
    rows = model.generate(**batch, **greedy)[:, batch.input_ids.shape[1]:]
    assert rows.tolist() == wanted["new"], name
    as_text = tokenizer(tokenizer.eos_token + " a", split_special_tokens=True)
    assert as_text.input_ids == wanted["special"], name
    written = tokenizer.apply_chat_template(chat, tokenize=False)
    assert written == tokenizer.bos_token + "user: hello\\n", written

    # Saved by transformers, and loaded again.
    again = os.path.join(root, name, "again")
    model.save_pretrained(again)
    tokenizer.save_pretrained(again)
    second = load(again, trust_remote_code=True)
    assert all(torch.equal(a, b) for a, b in zip(
        model.state_dict().values(), second.state_dict().values(), strict=True))
    with torch.no_grad():
        assert torch.equal(second(wanted["tokens"]).logits, logits), name

    # Beams, sampling, and a cache that goes on.
    beams = model.generate(**inputs, max_new_tokens=8, num_beams=3, do_sample=False)
    free = model.generate(**inputs, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(beams, free), name
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**inputs, max_new_tokens=5, **options)
    more = model.generate(first.sequences, cache=first.cache, max_new_tokens=59, do_sample=False)
    assert more[0, len(ids):].tolist() == new, name

    if wanted["filters"] is not None:  # a new model has them too
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        new = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        assert torch.allclose(new.model.filters.taps, wanted["filters"], rtol=0, atol=1e-6)
        assert 0.1 < new.model.blocks[0].mlp.up.weight.std() < 0.3

    # Training, half precision, refusals.
    labels = wanted["tokens"]
    loss = model(labels, labels=labels).loss
    loss.backward()
    predicted, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(predicted, targets)
    assert torch.allclose(loss, expected), name
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters()), name
    half = load(folder, trust_remote_code=True, dtype=torch.bfloat16)
    for tensor_name, tensor in half.state_dict().items():
        is_wide = "filters" in tensor_name or "implicit_filter" in tensor_name
        assert tensor.dtype == (torch.float32 if is_wide else torch.bfloat16), tensor_name
    assert half.generate(**inputs, max_new_tokens=3).shape[1] == len(ids) + 3
    hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(labels).last_hidden_state
    assert torch.equal(hidden @ model.get_input_embeddings().weight.T, logits), name
    padded = torch.ones_like(labels[:, :9])
    padded[0, 7:] = 0
    output = model(labels[:, :9], attention_mask=padded)
    for arguments, message in [
        ({"input_ids": labels[:, :1], "cache": output.cache}, "padding must be on the left"),
        ({"input_ids": labels.repeat(1, 2)}, "200 tokens exceed max_seq_len=150"),
        ({"input_ids": labels, "output_attentions": True}, "output_attentions is not supported"),
        ({"input_ids": labels, "cache": transformers.DynamicCache()}, "must be a StuCache"),
    ]:
        try:
            model(**arguments)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)
assert not any(m.split(".")[0] in ("stu", "train", "serve") for m in sys.modules)
print("all equal")
"""


def build(kind, tokenizer):
    """Return a model whose weights matter, with filters that no state gives if it is `no_state`."""
    torch.manual_seed(3)
    model = FlashSTU(
        ModelConfig(**SHAPE | {"vocab_size": tokenizer.vocab_size}, **KINDS_OF_MODELS[kind])
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(0.3 * torch.randn_like(weight))
            elif name != "embedding.weight" and "filter." not in name:
                weight.mul_(2)
        model.embedding.weight[tokenizer.eos_id] = 0  # so that it is never the likeliest
        if kind == "no_state":
            model.filters.add_(0.05 * torch.randn_like(model.filters))
    return model.eval()


@pytest.fixture(scope="module", params=[QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
def exported(request, tmp_path_factory, code_tokenizer):
    """A folder for each kind of model: `ours`, `theirs`, and what transformers must give."""
    root = tmp_path_factory.mktemp("transformers")
    for kind in request.param:
        tokenizer = code_tokenizer
        if kind == "full":
            tokenizer = make("bytes", root / "bytes")
        elif kind == "hyena":
            tokenizer = make("huggingface", root / "bpe", 300)
        model, folder = build(kind, tokenizer), root / kind
        others = {"chat_template.jinja": TEMPLATE.encode()}
        defaults = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "max_new_tokens": 40}
        save_model(folder / "ours", model, tokenizer, defaults, others=others)
        arguments = [str(folder / "ours"), "--output", str(folder / "theirs")]
        assert export.main([*arguments, "--format", "transformers"]) == 0
        params = SamplingParams(max_new_tokens=NEW_TOKENS, stop_at_eos=False)
        results = LLM(folder / "ours", "cpu", cache_gib=0.02).generate(PROMPTS, params, False)
        tokens = torch.randint(0, tokenizer.vocab_size, (2, 100))
        with torch.no_grad():
            logits = model(tokens)
        wanted = {"tokens": tokens, "logits": logits, "texts": PROMPTS}
        wanted["special"] = tokenizer.encode_prompt(tokenizer.token_text(tokenizer.eos_id) + " a")
        wanted["filters"] = model.filters if kind == "hybrid" else None
        wanted["prompts"] = [list(result.prompt_token_ids) for result in results]
        wanted["new"] = [list(result.outputs[0].token_ids) for result in results]
        assert all(tokenizer.eos_id not in new for new in wanted["new"])
        torch.save(wanted, folder / "wanted.pt")
    return root


def kinds(root):
    return [kind for kind in KINDS_OF_MODELS if (root / kind).is_dir()]


@pytest.fixture(scope="module")
def loaded(exported, tmp_path_factory):
    """The same folders, after a process without stu has used and saved them."""
    modules = tmp_path_factory.mktemp("modules")
    environment = os.environ | {"HF_HOME": str(modules), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", WITHOUT_STU, str(exported), *kinds(exported)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.endswith("all equal\n")
    return exported


def test_logits_and_tokens_in_a_process_without_stu(loaded):
    assert loaded.is_dir()


def test_import_gives_the_model_back(loaded, tmp_path):
    """From the exported folder, and from what transformers saved of it."""
    for kind in kinds(loaded):
        ours = load_tokenizer(loaded / kind / "ours")
        expected = load_model(loaded / kind / "ours")
        for source in ("theirs", "again"):
            output = tmp_path / kind / source
            assert import_published.main([str(loaded / kind / source), f"--output={output}"]) == 0
            model = load_model(output)
            assert model.config == expected.config
            for name, weight in expected.state_dict().items():
                assert torch.equal(model.state_dict()[name], weight), name
            assert load_generation(output) == load_generation(loaded / kind / "ours")
            assert (output / "chat_template.jinja").read_text() == TEMPLATE
            back = load_tokenizer(output)
            assert source == "again" or back.files == ours.files
            for text in PROMPTS:
                assert back.encode_prompt(text) == ours.encode_prompt(text)


def test_card_has_what_a_training_checkpoint_knows(trained, tmp_path):
    output = tmp_path / "theirs"
    assert export.main([str(trained), "--output", str(output), "--format=transformers"]) == 0
    card = (output / "README.md").read_text()
    settings = CheckpointFolder(trained / "checkpoints" / "last.ckpt").training["stu"]["settings"]
    tokens = 12 * settings["samples_per_step"] * 16
    config = transformers_folder.read_config(output)
    num_parameters = transformers_folder.load_transformers(output, config).num_parameters()
    for line in [
        "library_name: transformers",
        f"| parameters | {num_parameters:,} |",
        "| layout | hybrid, tensordot |",
        "| optimizer steps | 12 |",
        f"| tokens read | {tokens:,} |",
        "| optimizer | adamw |",
        "To be filled in, also as `license:`",
    ]:
        assert line in card
    validation = json.loads((trained / "validation.json").read_text())
    is_of_this_step = validation["step"] == 12
    assert (f"| loss, nats per token | {validation['val/loss']:.4f} |" in card) == is_of_this_step
    assert ("Not recorded with these weights" in card) != is_of_this_step
    assert json.loads((output / "generation_config.json").read_text())["do_sample"] is False


def test_card_counts_steps_whose_updates_were_skipped(tmp_path):
    """And the samples that were read, of which steps had another number before a resume."""
    settings = {"samples_per_step": 8, "data.seq_len": 16}
    training = {"global_step": 12, "optimizer_step": 11, "TokenData": {"position": 70}}
    folder = SimpleNamespace(
        path=tmp_path / "checkpoints" / "a", training={**training, "stu": {"settings": settings}}
    )
    facts = export._training_facts(folder)
    assert (facts["optimizer steps"], facts["tokens read"]) == ("12", "1,120")
    (tmp_path / "validation.json").write_text('{"step": 12, "val/loss": 2.0}')
    assert export._validation_facts(folder) == {"loss, nats per token": "2.0000"}


@pytest.mark.parametrize(
    "kind",
    [
        *(kind for kind in KINDS if kind != "cl100k_base"),
        pytest.param("cl100k_base", marks=pytest.mark.slow),
        *("ACGTN", "unigram", "nmt_nfkc"),
    ],
)
def test_tokenizers(kind, tmp_path):
    """A tokenizer.json gives the same ids, or there is none."""
    if kind in ("unigram", "nmt_nfkc"):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["ab abc b c", "a abc", "bca ab"] * 9),
            model_writer=model,
            model_type="unigram" if kind == "unigram" else "bpe",
            normalization_rule_name="identity" if kind == "unigram" else "nmt_nfkc",
            vocab_size=270,
            hard_vocab_limit=False,
            byte_fallback=True,
            minloglevel=2,
        )
        tokenizer = make_tokenizer({"tokenizer.model": model.getvalue()}, tmp_path)
        with pytest.raises(NotExact):
            tokenizer_json(tokenizer)
        return
    tokenizer = make(kind, tmp_path / "tokenizer")
    contents = tokenizer_json(tokenizer)
    assert contents == tokenizer.files.get("tokenizer.json", contents), "as it is"
    made = tokenizers.Tokenizer.from_buffer(contents)
    made.encode_special_tokens = True  # these texts have the names of some
    for text in texts() if kind in KINDS else ["GATTACA", "", "NNA"]:
        ids = made.encode(text).ids
        assert ids == tokenizer.encode_prompt(text)
        assert made.decode(ids) == text
    if kind == "ACGTN":
        with pytest.raises(Exception, match="UNK"):
            made.encode("GATX")


def test_tokenizer_that_adds_no_bos_gets_one(tmp_path):
    folder = make("huggingface", tmp_path / "bpe", 300).path.parent
    described = json.loads((folder / "tokenizer.json").read_text())
    described["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = read_tokenizer(folder)
    made = tokenizers.Tokenizer.from_buffer(tokenizer_json(tokenizer))
    assert made.encode("a b").ids == tokenizer.encode_prompt("a b") != tokenizer.encode("a b")


def test_without_an_equal_tokenizer_there_is_none(tmp_path, caplog, monkeypatch, code_tokenizer):
    def refuse(tokenizer):
        raise NotExact("the reason")

    monkeypatch.setattr(transformers_folder, "tokenizer_json", refuse)
    model = FlashSTU(ModelConfig(**SHAPE))
    save_model(tmp_path / "ours", model, code_tokenizer)
    settings = json.dumps({"chat_template": TEMPLATE})
    (tmp_path / "ours" / "tokenizer_config.json").write_text(settings)
    arguments = [str(tmp_path / "ours"), "--output", str(tmp_path / "theirs")]
    assert export.main([*arguments, "--format=transformers"]) == 0
    assert "no tokenizer for transformers gives the same ids: the reason" in caplog.text
    assert not (tmp_path / "theirs" / "tokenizer_config.json").exists()
    assert "AutoTokenizer" not in (tmp_path / "theirs" / "README.md").read_text()
    back = ["--output", str(tmp_path / "back")]
    assert import_published.main([str(tmp_path / "theirs"), *back]) == 0
    assert load_tokenizer(tmp_path / "back").files == code_tokenizer.files
    assert find_template(tmp_path / "back")[1] == TEMPLATE
    (tmp_path / "theirs" / "chat_template.jinja").unlink()
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(settings)
    assert import_published.main([str(tmp_path / "theirs"), *back, "--overwrite"]) == 0
    assert find_template(tmp_path / "back")[1] == TEMPLATE


def test_mistakes_are_named(tmp_path, code_tokenizer, capsys):
    model, ours, theirs = FlashSTU(ModelConfig(**SHAPE)), tmp_path / "ours", tmp_path / "theirs"
    save_model(ours, model, code_tokenizer)
    command = [str(ours), "--output", str(theirs), "--format=transformers"]
    assert export.main([*command, "--weights=int8"]) == 2
    assert "must be float for the transformers layout" in capsys.readouterr().err
    assert export.main(command) == 0
    output = ["--output", str(tmp_path / "back")]

    def refused(message, *arguments):
        assert import_published.main([str(theirs), *output, *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "back").exists()

    refused("leave it out: config.json has it", "--norm-eps=1e-6")
    config = json.loads((theirs / "config.json").read_text())
    for change, message in [
        ({"width": 48}, "], not floats of 16 bits or more [48, 48]"),
        ({"num_layers": 2}, "model.blocks.2.mixer_norm.weight is unknown"),
        ({"num_layers": 4}, "model.blocks.3.mixer_norm.weight is missing"),
        ({"width": "wide"}, 'config.json: width="wide" is not allowed'),
    ]:
        (theirs / "config.json").write_text(json.dumps(config | change))
        refused(message)
    (theirs / "config.json").write_text(json.dumps(config))
    for contents, message in [
        (b"{", "generation_config.json: not JSON"),
        (b'"\xff"', "generation_config.json: not JSON"),
        (b"[1]", "generation_config.json: a JSON object is needed"),
        (b'{"temperature": "hot"}', 'generation_config.json: temperature="hot" is not allowed'),
        (b'{"top_k": true}', "top_k=true is not allowed: it must be a whole number from 0"),
        (b'{"top_p": 1.1}', "top_p=1.1 is not allowed: it must be a number from 0 to 1"),
        (b'{"temperature": Infinity}', "temperature=Infinity is not allowed"),
        (b'{"do_sample": 1}', "do_sample=1 is not allowed: it must be true or false"),
    ]:
        (theirs / "generation_config.json").write_bytes(contents)
        refused(message)
    (theirs / "generation_config.json").unlink()
    (theirs / "tokenizer.model").unlink()
    (theirs / "tokenizer.json").unlink()
    refused("has no tokenizer: name one with --tokenizer")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "top_k": 3, "top_p": 0.5}, {"temperature": 1.0, "top_k": 3}),
        ({"do_sample": True, "temperature": 0.3, "top_k": None}, {"temperature": 0.3, "top_k": 50}),
        ({"temperature": 0.3, "max_new_tokens": 7}, {"temperature": 0.0, "max_new_tokens": 7}),
    ],
)
def test_sampling_has_the_defaults_of_transformers(tmp_path, values, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    found = generation_config.load_generation(tmp_path)
    assert {name: found[name] for name in expected} == expected
    assert found.get("top_p") == values.get("top_p")


@pytest.mark.parametrize("template", ["[1]", '[{"name": ["a"]}]', '[{"name": "default"}]', "7"])
def test_damaged_templates_are_named(tmp_path, code_tokenizer, capsys, template):
    save_model(tmp_path / "ours", FlashSTU(ModelConfig(**SHAPE)), code_tokenizer)
    settings = f'{{"chat_template": {template}}}'
    (tmp_path / "ours" / "tokenizer_config.json").write_text(settings)
    command = [str(tmp_path / "ours"), "--output", str(tmp_path / "theirs")]
    assert export.main([*command, "--format=transformers"]) == 2
    assert "tokenizer_config.json: chat_template" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["ours"]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "validation.json: not JSON"),
        ("[]", "validation.json: a JSON object is needed"),
        ('{"step": 12, "val/loss": "low"}', 'val/loss="low" is not allowed: it must be a number'),
    ],
)
def test_damaged_results_are_named(tmp_path, contents, message):
    folder = SimpleNamespace(path=tmp_path / "checkpoints" / "a", training={"global_step": 12})
    (tmp_path / "validation.json").write_text(contents)
    with pytest.raises(UserError, match=message):
        export._validation_facts(folder)


def test_narrow_filters_become_wide(tmp_path, code_tokenizer):
    """As those that other programs cast, so that the model can be loaded; the file itself may be
    named."""
    defaults = {"temperature": 0.5}
    save_model(tmp_path / "ours", FlashSTU(ModelConfig(**SHAPE)), code_tokenizer, defaults)
    theirs, back = tmp_path / "theirs", tmp_path / "back"
    command = [str(tmp_path / "ours"), f"--output={theirs}", "--format=transformers"]
    assert export.main(command) == 0
    file = theirs / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    assert import_published.main([str(file), f"--output={back}"]) == 0
    assert load_tokenizer(back).files == code_tokenizer.files
    assert load_generation(back)["temperature"] == 0.5
    model = load_model(back, dtype=None)
    assert torch.equal(model.filters, tensors["model.filters.taps"].float())
    assert model.embedding.weight.dtype == torch.bfloat16


def test_mixer_of_other_code_is_refused(tmp_path, code_tokenizer, capsys, monkeypatch):
    monkeypatch.setitem(MIXERS, "mine", "stu.hyena:Hyena")
    save_model(tmp_path / "m", FlashSTU(ModelConfig(**SHAPE, layout="mine")), code_tokenizer)
    command = [str(tmp_path / "m"), "--output", str(tmp_path / "t"), "--format=transformers"]
    assert export.main(command) == 2
    assert "transformers, whose code has no mixer mine" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("lag_step", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_states_of_the_exported_code_give_the_filters(lag_step):
    """At the rates that ours have, refined or not."""
    taps = torch.from_numpy(spectral_filters(4096, 24)).float()[::lag_step]
    found, _ = fitting_realisation(taps.double(), [None], torch.float32)
    theirs = Realisation(taps, found.rates.tolist())
    decays = torch.exp(-torch.arange(len(taps) - 1)[:, None] * theirs.rates)
    errors = (decays @ theirs.outputs.T - taps[1:]).abs().amax(0)
    assert (errors <= 5e-7 * taps.abs().amax(0)).all()


def test_states_are_on_the_device_of_their_layer():
    """Which need not be that of the filters."""
    states, memory = Realisation(torch.rand(9, 2), [0.1, 0.5]), LayerMemory()
    inputs = torch.zeros(1, 3, 4, device="meta")
    assert states.step(memory, inputs) is None
    past = states.step(memory, inputs)
    assert memory.tensors["state"].is_meta
    assert all(part.is_meta for part in past)
