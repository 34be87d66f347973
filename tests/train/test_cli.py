"""`stu-train` as a user types it: what it writes, logs and refuses."""

import math
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from stu.config import ModelConfig
from stu.tokenizer import Tokenizer
from tests.test_boundaries import options_with_underscores
from tests.train.conftest import MODEL
from tests.train.saved import load_checkpoint
from train import cli, report
from train.checkpoint.export import export
from train.data.shards import TokenShards
from train.module import FlashSTUModule


@pytest.fixture
def run(settings, tmp_path):
    """Train for a few steps; returns the exit code."""

    def train(*arguments, folder="run"):
        return cli.main([*settings, f"--run-dir={tmp_path / folder}", *map(str, arguments)])

    return train


def test_logs_and_files_of_a_run(run, tmp_path, data):
    warmup = "--model.optimizer.warmup_steps=2"
    more = "--checkpoint-every-steps=5", "--keep-checkpoints=1", warmup
    assert run("--trainer.max_steps=12", *more) == 0
    folder = tmp_path / "run"
    assert sorted(file.name for file in (folder / "checkpoints").iterdir()) == [
        "last.ckpt",
        "step-00000012.ckpt",
    ]
    assert load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 12
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["config"]["width"] == 16

    curves = report.read_curves(folder)
    steps, losses = curves["train/loss"]
    assert steps == list(range(1, 13))
    assert losses[0] == pytest.approx(math.log(300), abs=0.7)
    assert losses[-1] < losses[0] - 0.3
    assert curves["train/lr"][1][:3] == pytest.approx([0.005, 0.01, 0.01])
    assert curves["data/position"][1] == [2 * (step + 1) for step in range(12)]
    assert all(0 < norm < 100 for norm in curves["train/grad_norm"][1])
    assert all(value > 0 for value in curves["train/tokens_per_second"][1])
    assert curves["val/bits_per_byte"][0] == [5, 10, 12]  # the last one at the end

    # Bits per byte again, from the checkpoint at that step, in one pass over all tokens.
    export(folder / "checkpoints" / "last.ckpt", tmp_path / "model")
    assert curves["val/bits_per_byte"][1][-1] == pytest.approx(
        validation_bits_per_byte(tmp_path / "model", data), rel=1e-5
    )


def validation_bits_per_byte(model_dir, data):
    from stu.model_dir import load_model, load_tokenizer

    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
    shards = TokenShards(data, "validation")
    tokens = torch.from_numpy(shards.read(0, len(shards)))
    nats, num_bytes = 0.0, 0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 17]
        logits = model(window[None, :-1])[0]
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        num_bytes += len(tokenizer.decode(window[1:].tolist()).encode())
    return nats / math.log(2) / num_bytes


def test_gradients_are_clipped(run, tmp_path):
    """With a clip of almost nothing AdamW's eps dominates, and the weights stay put."""
    clip = "--trainer.gradient_clip_val=1e-12"
    assert run("--trainer.max_steps=3", clip, "--model.optimizer.weight_decay=0") == 0
    weights = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    torch.manual_seed(0)
    assert run("--trainer.max_steps=3", folder="free") == 0
    free = load_checkpoint(tmp_path / "free" / "checkpoints" / "last.ckpt")["state_dict"]
    name = "model.embedding.weight"
    assert (weights[name] - free[name]).abs().max() > 1e-3
    logged = report.read_curves(tmp_path / "run")["train/grad_norm"][1]
    assert min(logged) > 1e-3  # the norm before clipping


def test_accumulated_micro_batches_are_one_step(run, tmp_path):
    assert run("--trainer.max_steps=4", "--data.micro_batch_size=4") == 0
    accumulate = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=10"]
    assert run("--trainer.max_steps=4", *accumulate, folder="accumulated") == 0
    losses = report.read_curves(tmp_path / "run")["train/loss"][1]
    accumulated = report.read_curves(tmp_path / "accumulated")["train/loss"][1]
    assert accumulated == pytest.approx(losses, abs=1e-4)
    names = "run", "accumulated"
    a, b = (load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in names)
    for name, weight in a["state_dict"].items():
        torch.testing.assert_close(weight, b["state_dict"][name], rtol=0, atol=2e-5)
    assert a["TokenData"]["position"] == b["TokenData"]["position"] == 16


def test_vocabulary_comes_from_the_shards(settings, tmp_path):
    others = [argument for argument in settings if "vocab_size" not in argument]
    assert cli.main([*others, f"--run-dir={tmp_path}", "--trainer.max_steps=1"]) == 0
    weights = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert len(weights["model.embedding.weight"]) == 300


def test_progress_without_a_terminal(run, capsys):
    accumulate = ["--trainer.accumulate_grad_batches=2", "--trainer.log_every_n_steps=2"]
    assert run("--trainer.max_steps=4", *accumulate) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/4", "4/4"]
    assert re.search(r"loss \d\.\d{3}  [\d,]+ tokens/s  [\d.]+ steps/s  0:00:\d\d left$", lines[0])
    assert lines[1].endswith("0:00:00 left")


def test_checkpoint_is_all_that_export_needs(run, tmp_path, data):
    assert run("--trainer.max_steps=1") == 0
    carried = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["stu"]
    assert ModelConfig.from_dict(carried["model_config"]) == ModelConfig(**MODEL)
    model_bytes = Tokenizer(data / "tokenizer.model").model_bytes
    assert carried["tokenizer"].numpy().tobytes() == model_bytes


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.config.num_layer=3", "did you mean 'model.config.num_layers'?"),
        ("--log_samples=true", "did you mean 'log-samples'?"),
        ("--qqqq=1", "--qqqq=1: --help lists all names"),
        ("--trainer.max_step=3", "did you mean 'trainer.max_steps'?"),
        ("--model.config.width=abc", "model.config.width"),
        (
            "--model.config.width=17",
            "model.config.num_heads=2 is not allowed: .* that divides width=17",
        ),
        ("--model.config.vocab_size=999", "vocab_size=999, but the token shards .* 300 tokens"),
        ("--data.seq_len=64", "seq_len=64 exceeds model.config.max_seq_len=32"),
        ("--data.dir=/nowhere", "/nowhere: no index.json"),
        ("--trainer.max_steps=-1", "trainer.max_steps=-1 is not allowed"),
        ("--trainer.precision=16-mixed", 'trainer.precision="16-mixed" is not allowed: float16'),
        ("--trainer.accumulate_grad_batches=0", "accumulate_grad_batches=0 is not allowed"),
        ("--trainer.val_check_interval=0", "val_check_interval=0 is not allowed"),
        ("--trainer.max_epochs=3", "trainer.max_epochs is chosen by stu-train"),
        ("--trainer.limit_train_batches=3", "trainer.limit_train_batches is chosen by stu-train"),
        ("--trainer.logger=false", "trainer.logger is chosen by stu-train"),
        (
            "--model.optimizer.warmup_steps=3",
            r"warmup_steps=3 is longer than the run .*max_steps=2",
        ),
        ("--model.optimizer.beta1=2", r"optimizer.beta1=2.0 is not allowed"),
        ("--checkpoint-every-steps=0", "--checkpoint-every-steps=0 is not allowed"),
        ("--resume=/nowhere.ckpt", "checkpoint /nowhere.ckpt: no such folder"),
        ("--optimizer=SGD", "unrecognized arguments"),
        ("--trainer.max_time=00:01", "not a valid duration"),
        ("--resume=last", "no checkpoints/last.ckpt"),
        ("--config=/nowhere.yaml", "/nowhere.yaml"),
    ],
)
def test_mistakes_are_one_clear_error_and_leave_nothing(run, tmp_path, capsys, argument, message):
    try:
        code = run("--trainer.max_steps=2", argument)
    except SystemExit as stop:  # how a command-line parser stops
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert re.search(r"stu-train: error: [\s\S]*" + message, error)
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_unknown_key_in_a_file(run, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("model:\n  config:\n    widht: 3\n")
    with pytest.raises(SystemExit):
        run("--config", tmp_path / "bad.yaml")
    assert "did you mean 'model.config.width'?" in capsys.readouterr().err


def test_a_run_is_not_overwritten(run, tmp_path, capsys):
    assert run("--trainer.max_steps=1") == 0
    before = (tmp_path / "run" / "checkpoints" / "last.ckpt" / "training.pt").read_bytes()
    assert run("--trainer.max_steps=1") == 2
    assert "continue it with --resume last" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt" / "training.pt").read_bytes() == before


def test_short_help_names_real_settings(capsys):
    assert cli.main(["--help"]) == 0
    short = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--help-all"])
    full = capsys.readouterr().out
    for name in set(cli.COMMON_SETTINGS) - {"--help-all"}:
        assert name in short
        assert re.search(rf"{re.escape(name)}\b", full), name
    assert options_with_underscores(full) == set()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_sixteen_bit_training(run, tmp_path, precision):
    """Clipping included; the filters stay float32, and validation sums do not round."""
    assert run("--trainer.max_steps=5", f"--trainer.precision={precision}") == 0
    weights = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    assert weights["model.filters"].dtype == torch.float32
    curves = report.read_curves(tmp_path / "run")
    assert run("--trainer.max_steps=5", folder="single") == 0
    single = report.read_curves(tmp_path / "single")
    for name in ("val/loss", "val/bits_per_byte"):
        assert curves[name][1] == pytest.approx(single[name][1], rel=0.02)


def test_a_terminated_run_does_not_look_finished(settings, tmp_path):
    program = Path(sys.executable).with_name("stu-train")
    command = [program, *settings, f"--run-dir={tmp_path / 'run'}", "--trainer.max_steps=1000000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("step 3/"):
                process.terminate()
                break
        last_words = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert "for SIGTERM; the checkpoint is written" in last_words


def test_a_fault_of_the_program_has_its_own_code_and_names_rank_and_host(
    settings, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(FlashSTUModule, "training_step", fail)
    assert cli.main([*settings, f"--run-dir={tmp_path / 'run'}", "--trainer.max_steps=1"]) == 3
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert f"a fault of the program, on rank 0 on {socket.gethostname()}" in shown
