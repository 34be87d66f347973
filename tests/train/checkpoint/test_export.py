"""From a checkpoint to a model directory."""

import os
import subprocess

import pytest
import torch

from stu.model_dir import load_config, load_model, load_tokenizer
from tests import forked
from tests.train.saved import load_checkpoint
from train import cli
from train.checkpoint import export


@pytest.fixture
def run(settings, tmp_path):
    arguments = [*settings, f"--run-dir={tmp_path / 'run'}", "--trainer.max_steps=2"]
    assert cli.main(arguments) == 0
    return tmp_path / "run"


def test_export_of_a_run(run, tmp_path, data):
    assert export.main([str(run), "--output", str(tmp_path / "model")]) == 0
    model = load_model(tmp_path / "model")
    trained = load_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    assert {f"model.{name}" for name in model.state_dict()} == set(trained)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, trained[f"model.{name}"])
    assert load_config(tmp_path / "model").width == 16
    model_bytes = (data / "tokenizer.model").read_bytes()
    assert load_tokenizer(tmp_path / "model").model_bytes == model_bytes


def test_bfloat16(run, tmp_path):
    output = tmp_path / "model"
    assert export.main([str(run), "--output", str(output), "--dtype", "bfloat16"]) == 0
    model = load_model(output, dtype=torch.bfloat16)
    single = load_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    assert torch.equal(model.embedding.weight, single["model.embedding.weight"].bfloat16())
    assert torch.equal(model.filters, single["model.filters"])


def test_existing_output(run, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes").write_text("mine")
    assert export.main([str(run), "--output", str(tmp_path / "model")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert os.listdir(tmp_path / "model") == ["notes"]
    assert export.main([str(run), "--output", str(tmp_path / "model"), "--overwrite"]) == 0
    assert "notes" not in os.listdir(tmp_path / "model")


def test_mistakes(run, tmp_path, capsys):
    for name in ("other", "object", "text"):
        (tmp_path / f"{name}.ckpt").mkdir()
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt" / "training.pt")
    torch.save({"stu": ValueError("any object")}, tmp_path / "object.ckpt" / "training.pt")
    (tmp_path / "text.ckpt" / "training.pt").write_text("hello")
    for checkpoint, message in [
        (tmp_path / "other.ckpt", "not written by stu-train"),
        (tmp_path / "object.ckpt", "cut short, or not written by stu-train"),
        (tmp_path / "text.ckpt", "cut short, or not written by stu-train"),
        (tmp_path / "none.ckpt", "no such folder"),
        (tmp_path, "no checkpoints/last.ckpt"),
    ]:
        assert export.main([str(checkpoint), "--output", str(tmp_path / "model")]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export.main([str(run), "--output", str(tmp_path / "model"), "--dtyp", "bfloat16"])
    assert "did you mean 'dtype'" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


FULL_DISK = """
import resource, signal, sys
from train.checkpoint import export
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails with an error
resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
sys.exit(export.main([sys.argv[1], "--output", sys.argv[2]]))
"""


def test_full_disk_leaves_nothing_behind(run, tmp_path):
    command = [forked.python(), "-c", FULL_DISK, run, tmp_path / "out" / "model"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "stu-export: error" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
