"""From a checkpoint to a model directory."""

import json
import os
import re
import shutil

import pytest
import torch

from stu.chat.template import find_template
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.model_dir import load_config, load_model, load_tokenizer, save_model
from tests import forked
from tests.stu.tokenizers.vocabularies import make
from tests.train.saved import last_checkpoint
from train.checkpoint import export, import_published


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_of_a_run(trained, tmp_path, data, dtype):
    output, dtype_name = tmp_path / "model", str(dtype).removeprefix("torch.")
    assert export.main([str(trained), "--output", str(output), "--dtype", dtype_name]) == 0
    model = load_model(output, dtype=dtype)
    expected = last_checkpoint(trained)["state_dict"]
    assert {f"model.{name}" for name in model.state_dict()} == set(expected)
    for name, weight in model.state_dict().items():
        stored = expected[f"model.{name}"]
        assert torch.equal(weight, stored if name == "filters" else stored.to(dtype)), name
    assert load_config(output).width == 16
    assert (
        load_tokenizer(output).files["tokenizer.model"] == (data / "tokenizer.model").read_bytes()
    )


def test_export_in_8_bits(trained, tmp_path, capsys):
    sizes = {}
    for weights in ("float", "int8"):
        output = tmp_path / weights
        assert export.main([str(trained), "--output", str(output), "--weights", weights]) == 0
        sizes[weights] = (output / "model.safetensors").stat().st_size
    model = load_model(tmp_path / "int8")
    assert model.weights == "int8"
    saved = 3 * sum(model.get_parameter(name).numel() for name in model.matrices)
    assert sizes["float"] - sizes["int8"] > 0.8 * saved
    (tmp_path / "int8" / "chat_template.jinja").write_text("{{ messages }}")
    assert export.main([str(tmp_path / "int8"), "--output", str(tmp_path / "again")]) == 0
    assert load_model(tmp_path / "again").weights == "int8", "as it was"
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ messages }}"
    command = [str(tmp_path / "int8"), "--output", str(tmp_path / "p"), "--format", "published"]
    assert export.main([*command, "--weights", "int8"]) == 2
    assert 'weights="int8" is not allowed: it must be float' in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_existing_output_is_kept_unless_overwritten(trained, tmp_path, capsys):
    output = tmp_path / "model"
    output.mkdir()
    (output / "notes").write_text("mine")
    assert export.main([str(trained), "--output", str(output)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert os.listdir(output) == ["notes"]
    assert export.main([str(trained), "--output", str(output), "--overwrite"]) == 0
    assert "notes" not in os.listdir(output)


def test_an_output_that_holds_the_checkpoint_is_refused(trained, tmp_path, capsys):
    run, model = tmp_path / "runs" / "a", tmp_path / "models" / "a"
    shutil.copytree(trained, run)
    export.main([str(run), "--output", str(model)])
    for command, checkpoint, output in [
        (export, run, run),
        (export, run, run.parent),
        (export, model, model.parent),
        (import_published, model, model.parent),
    ]:
        assert command.main([str(checkpoint), "--output", str(output), "--overwrite"]) == 2
        assert "does not lie in" in capsys.readouterr().err
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert export.main([str(model), "--output", str(model), "--weights=int8", "--overwrite"]) == 0


def test_a_template_beside_settings_of_the_tokenizer_is_kept(tmp_path):
    tokenizer = make("huggingface", tmp_path / "tokenizer", 300)
    model = FlashSTU(ModelConfig(tokenizer.vocab_size, width=16, num_layers=1, max_seq_len=32))
    save_model(tmp_path / "a", model, tokenizer)
    settings = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages }}"
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert export.main([str(tmp_path / "a"), "--output", str(tmp_path / "b")]) == 0
    assert find_template(tmp_path / "b")[1] == "{{ messages }}"
    assert load_tokenizer(tmp_path / "b").start_ids == tokenizer.start_ids


def test_mistakes_are_named(trained, tmp_path, capsys):
    for name in ("other", "object", "text"):
        (tmp_path / f"{name}.ckpt").mkdir()
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt" / "training.pt")
    torch.save({"stu": ValueError("any object")}, tmp_path / "object.ckpt" / "training.pt")
    (tmp_path / "text.ckpt" / "training.pt").write_text("hello")
    output = ["--output", str(tmp_path / "model")]
    for checkpoint, message in [
        ("other.ckpt", "not written by stu-train"),
        ("object.ckpt", "cut short, or not written by stu-train"),
        ("text.ckpt", "cut short, or not written by stu-train"),
        ("none.ckpt", "no such folder"),
        ("", "no checkpoints/last.ckpt"),
    ]:
        assert export.main([str(tmp_path / checkpoint), *output]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export.main([str(trained), *output, "--dtyp", "bfloat16"])
    assert "did you mean 'dtype'" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


FULL_DISK = """
import resource, signal, sys
from train.checkpoint import export
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails with an error
resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
sys.exit(export.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("layout", ["stu", "published"])
def test_full_disk_leaves_nothing_behind(trained, tmp_path, layout):
    output = tmp_path / "out" / "model"
    command = [forked.python(), "-c", FULL_DISK, trained, "--output", output, "--format", layout]
    result = forked.run(*command)
    assert result.returncode == 2, result.stderr
    assert re.search(f"stu-export: error: {output}: .*could not be written", result.stderr)
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == []
