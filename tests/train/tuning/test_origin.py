"""Runs that start from the weights of a model directory or of a published checkpoint."""

import base64
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from stu.config import ModelConfig
from stu.filters import spectral_filters
from stu.model import FlashSTU
from stu.model_dir import load_model, save_model
from stu.tokenizer import read_tokenizer
from tests import forked
from tests.train.conftest import MODEL, parallel, slow
from tests.train.parallel.test_zero import assert_close
from tests.train.saved import assert_same_state, checkpoint, load_checkpoint
from train import cli
from train.checkpoint.export import export
from train.data.config import PrepareConfig
from train.data.prepare import prepare
from train.plan import cli as plan
from train.tuning.origin import Origin

STEPS, SAVED = 4, 2


@pytest.fixture(scope="module")
def origin(trained, tmp_path_factory):
    """A model directory of a trained model."""
    folder = tmp_path_factory.mktemp("origin") / "model"
    export(trained, folder)
    return folder


@pytest.fixture(scope="module")
def shapeless(settings):
    """Settings of a run that say nothing of the model's shape."""
    return [text for text in settings if not text.startswith("--model.config.")]


def arguments(run, origin, *more):
    length = f"--trainer.max_steps={STEPS}", f"--checkpoint-every-steps={SAVED}"
    return [f"--run-dir={run}", f"--init-from={origin}", *length, *map(str, more)]


@pytest.fixture(scope="module")
def tuned(origin, shapeless, tmp_path_factory):
    """A run of four steps with a checkpoint after two, only to be read."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    assert cli.main([*shapeless, *arguments(run, origin, "--trainer.devices=1")]) == 0
    return run


@pytest.fixture
def start(shapeless, tmp_path, monkeypatch):
    """Function that prepares a run, without training, and returns its model's tensors."""
    begun = []
    monkeypatch.setattr(L.Trainer, "fit", lambda self, module, **_: begun.append(module))

    def start(origin, *more):
        assert cli.main([*shapeless, *arguments(tmp_path / "run", origin, *more)]) == 0
        return begun[-1].model.state_dict()

    return start


def refusal(capsys, arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(cli.main([*map(str, arguments)]))
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def write_ranks(folder, special_tokens, **marks):
    """Write ranks of the bytes, as tiktoken's are published, under a name of their own."""
    symbols = [base64.b64encode(bytes([byte])).decode() for byte in range(256)]
    lines = [f"{symbol} {rank}\n" for rank, symbol in enumerate(symbols)]
    (folder / "mine.tiktoken").write_text("".join(lines))
    settings = {"pattern": r"\s+|\S+", "special_tokens": special_tokens, **marks}
    (folder / "mine.tiktoken.json").write_text(json.dumps(settings))
    return folder / "mine.tiktoken"


def test_new_run_has_the_weights_and_says_where_they_are_from(start, origin, tmp_path):
    weights = start(origin)
    expected = load_file(origin / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    job = json.loads((tmp_path / "run" / "jobs" / "00001.json").read_text())
    assert job["init_from"]["path"] == str(origin.resolve())
    assert len(job["init_from"]["sha256"]) == 64


def test_published_checkpoint_gives_the_same_weights(start, trained, origin, tmp_path, capsys):
    export(trained, tmp_path / "published", layout="published")
    weights = start(tmp_path / "published")
    expected = load_file(origin / "model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    (tmp_path / "published" / "tokenizer.model").unlink()
    start(tmp_path / "published", f"--run-dir={tmp_path / 'other'}")
    assert "has no tokenizer" in capsys.readouterr().err


def test_published_checkpoint_accepts_the_data_of_its_tokenizer_only(
    trained, shapeless, other_data, tmp_path, capsys
):
    folder = tmp_path / "published"
    export(trained, folder, layout="published")
    (folder / "tokenizer.model").unlink()
    run = f"--run-dir={tmp_path / 'run'}", f"--init-from={folder}"
    error = refusal(capsys, [*shapeless, f"--data.dir={other_data}", *run])
    size = read_tokenizer(other_data).vocab_size
    assert f"has {size} tokens, and the model" in error
    assert "which has no tokenizer, 300: put its own beside" in error
    write_ranks(folder, {"<end>": 299}, eos_token="<end>")
    error = refusal(capsys, [*shapeless, *run])
    assert "made with another tokenizer" in error
    assert f"--tokenizer {folder / 'mine.tiktoken'}" in error


def test_folder_for_transformers_gives_the_same_weights(start, trained, origin, tmp_path):
    export(trained, tmp_path / "exported", layout="transformers")
    weights, expected = start(tmp_path / "exported"), load_file(origin / "model.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_step_and_optimizer_begin_anew(tuned, origin):
    before = load_file(origin / "model.safetensors")
    saved = load_checkpoint(checkpoint(tuned, SAVED))
    assert (saved["global_step"], saved["optimizer_step"]) == (SAVED, SAVED)
    assert saved["TokenData"]["position"] == SAVED * 2
    # Two steps of AdamW move a weight by little more than twice the learning rate.
    moved = [
        (saved["state_dict"][f"model.{name}"] - tensor).abs().max()
        for name, tensor in before.items()
    ]
    assert 0 < max(moved) < 0.03


def test_resumed_run_does_not_need_the_model(tuned, origin, shapeless, tmp_path):
    gone = tmp_path / "model"
    shutil.copytree(origin, gone)
    run = tmp_path / "run"
    given = [*shapeless, *arguments(run, gone, "--trainer.devices=1")]
    assert cli.main(given) == 0
    shutil.rmtree(gone)
    shutil.rmtree(checkpoint(run, STEPS))
    (run / "checkpoints" / "last.ckpt").unlink()
    assert cli.main([*given, "--resume=auto"]) == 0
    expected = load_checkpoint(checkpoint(tuned, STEPS))
    actual = load_checkpoint(checkpoint(run, STEPS))
    assert_same_state(actual, expected)
    assert actual["stu"]["init_from"]["sha256"] == expected["stu"]["init_from"]["sha256"]


@pytest.mark.parametrize("stage", [*map(slow, (None, 0, 1, 2, 3, "fsdp"))])
def test_ranks_start_from_the_same_weights(tuned, origin, shapeless, tmp_path, stage):
    more = [f"--{name}={value}" for name, value in parallel(stage).items()]
    run = arguments(tmp_path / "run", origin, "--trainer.devices=2", *more)
    command = [forked.program("stu-train"), *shapeless, *run, "--data.micro_batch_size=1"]
    done = forked.run(*command, PYTHONPATH=str(Path.cwd()))
    assert done.returncode == 0, done.stderr[-3000:]
    actual = load_checkpoint(checkpoint(tmp_path / "run", STEPS))
    expected = load_checkpoint(checkpoint(tuned, STEPS))
    assert_close(actual, expected)
    assert actual["stu"]["init_from"] == expected["stu"]["init_from"]


def test_longer_context_has_new_filters_and_the_same_weights(start, origin):
    weights = start(origin, "--model.config.max_seq_len=50")
    expected = load_file(origin / "model.safetensors")
    filters = torch.from_numpy(spectral_filters(50, 4)).float()
    assert torch.equal(weights.pop("filters"), filters)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def test_a_plan_refuses_no_adapters_for_their_memory(origin, shapeless, capsys, monkeypatch):
    """It is that of training all weights."""
    monkeypatch.setattr("train.plan.report.show_plan", lambda *_: 1)
    given = [*shapeless, f"--init-from={origin}", "--gpus=1"]
    assert plan.main([*given, "--lora.r=2"]) == 0
    assert "with adapters alone, the run may fit" in capsys.readouterr().err
    assert plan.main(given) == 1


def test_fields_that_differ_are_named_together(origin, shapeless, tmp_path, capsys):
    other = "--model.config.width=32", "--model.config.num_layers=3"
    for command in (cli.main, lambda given: plan.main([*given, "--gpus=1"])):
        given = [*shapeless, *other, f"--init-from={origin}"]
        given += [f"--run-dir={tmp_path / 'run'}"]
        try:
            code = command(given)
        except SystemExit as stop:
            code = stop.code
        error = " ".join(capsys.readouterr().err.split())
        assert code == 2
        assert "model.config.width is 32, and 16 in --init-from" in error
        assert "model.config.num_layers is 3, and 2 in --init-from" in error
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """Token shards of another tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "a.txt").write_text("for value in self:\n" * 200)
    (folder / "b.txt").write_text("def x(y):\n" * 200)
    (folder / "c.txt").write_text("import None\n" * 200)
    config = PrepareConfig(
        [str(folder)], folder / "data", tokenizer="bytes", validation_fraction=0.5, workers=1
    )
    prepare(config)
    return folder / "data"


def test_other_tokenizer_is_refused_or_keeps_rows_by_bytes(
    start, origin, shapeless, other_data, tmp_path, capsys
):
    other = f"--data.dir={other_data}"
    run = f"--run-dir={tmp_path / 'refused'}"
    error = refusal(capsys, [*shapeless, other, run, f"--init-from={origin}"])
    assert "made with another tokenizer" in error
    assert "--init-tokens by-bytes" in error
    weights = start(origin, other, "--init-tokens=by-bytes")
    before = load_model(origin).embedding.weight
    old, new = read_tokenizer(origin), read_tokenizer(other_data)
    rows = weights["embedding.weight"]
    assert len(rows) == new.vocab_size
    assert torch.equal(rows[new.eos_id], before[old.eos_id])
    for token in range(new.vocab_size):
        own = new.token_bytes(token)
        same = [i for i in range(old.vocab_size) if own and old.token_bytes(i) == own]
        if same:
            assert any(torch.equal(rows[token], before[i]) for i in same), own
        elif token not in (new.bos_id, new.eos_id):
            torch.testing.assert_close(rows[token], before.mean(0))


def test_control_tokens_keep_rows_by_role_or_else_by_name(tmp_path):
    names = {"<a>": 256, "<b>": 257, "<c>": 258}
    torch.manual_seed(0)
    before = FlashSTU(ModelConfig(**{**MODEL, "vocab_size": 300}))
    old, new = tmp_path / "old", tmp_path / "new"
    new.mkdir()

    def rows(old_marks, new_marks):
        tokenizer = read_tokenizer(write_ranks(tmp_path, names, **old_marks), 300)
        shutil.rmtree(old, ignore_errors=True)
        save_model(old, before, tokenizer)
        path = write_ranks(new, {**names, "<d>": 259}, **new_marks)
        after = FlashSTU(before.config)
        Origin(old).copy_to(after, SimpleNamespace(tokenizer_path=path))
        same = (after.embedding.weight[:, None] == before.embedding.weight).all(-1)
        assert same[:256].nonzero()[:, 1].tolist() == [*range(256)]
        return [same[token].nonzero().flatten().tolist() for token in range(256, 260)]

    one, two = {"eos_token": "<a>"}, {"bos_token": "<a>", "eos_token": "<b>"}
    # One old token for both; two old ones for one; roles of other names; roles that are gone.
    assert rows(one, two) == [[256], [256], [258], []]
    assert rows(two, one) == [[257], [257], [258], []]
    assert rows(two, {"bos_token": "<d>", "eos_token": "<c>"}) == [[256], [257], [257], [256]]


def test_unused_rows_are_kept_and_added(start, origin, tmp_path):
    more = start(origin, "--model.config.vocab_size=310")["embedding.weight"]
    before = load_model(origin).embedding.weight
    assert torch.equal(more[:300], before)
    torch.testing.assert_close(more[300:], before.mean(0).expand(10, -1))
    padded = load_model(origin)
    config = {**padded.config.to_dict(), "vocab_size": 310}
    wide = FlashSTU(type(padded.config).from_dict(config))
    save_model(tmp_path / "wide", wide, read_tokenizer(origin, 310))
    kept = start(tmp_path / "wide", f"--run-dir={tmp_path / 'b'}")["embedding.weight"]
    assert torch.equal(kept, wide.embedding.weight)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--init-tokens=by-bytes"], "it needs --init-from"),
        (["--init-from={run}"], "export it first: stu-export"),
        (["--init-from={run}/none"], "no such file"),
    ],
)
def test_wrong_origins(trained, shapeless, tmp_path, capsys, given, message):
    given = [text.format(run=trained) for text in given]
    assert message in refusal(capsys, [*shapeless, f"--run-dir={tmp_path / 'run'}", *given])
    assert not (tmp_path / "run").exists()
