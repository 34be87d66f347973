"""`stu-train` as a user types it: what it writes, logs and refuses."""

import errno
import json
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

from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.model_dir import load_model, load_tokenizer
from tests.test_boundaries import options_with_underscores
from tests.train.conftest import MODEL
from tests.train.saved import last_checkpoint, losses
from train import cli, report
from train.checkpoint.export import export
from train.checkpoint.folder import _not_written
from train.data.shards import TokenShards
from train.module import FlashSTUModule


@pytest.fixture
def run(train, tmp_path):
    """Function that trains for a few steps in a folder of this test."""

    def run(*arguments, folder="run", **options):
        return train(tmp_path / folder, *arguments, **options)

    return run


def test_logs_and_files_of_a_run(trained, tmp_path, data):
    folder = trained / "checkpoints"
    assert {file.name for file in folder.iterdir()} == {"last.ckpt", "step-00000012.ckpt"}
    saved = last_checkpoint(trained)
    assert saved["global_step"] == 12
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["model"]["config"]["width"] == 16
    assert config["model"]["config"]["vocab_size"] == 300  # from the token shards
    assert ModelConfig.from_dict(saved["stu"]["model_config"]) == ModelConfig(**MODEL)
    (name, contents), *others = saved["stu"]["tokenizer"].items()
    assert (name, others) == ("tokenizer.model", [])
    assert contents.numpy().tobytes() == (data / name).read_bytes()

    curves = report.read_curves(trained)
    steps, losses = curves["train/loss"]
    assert steps == list(range(1, 13))
    assert losses[0] == pytest.approx(math.log(300), abs=0.7)
    assert losses[-1] < losses[0] - 0.3
    assert curves["train/lr"][1][:3] == pytest.approx([0.005, 0.01, 0.01])
    assert curves["data/position"][1] == [2 * (step + 1) for step in range(12)]
    assert all(0 < norm < 100 for norm in curves["train/grad_norm"][1])
    assert all(value > 0 for value in curves["train/tokens_per_second"][1])
    assert curves["val/bits_per_byte"][0] == [5, 10, 12]  # the last one at the end
    results = json.loads((trained / "validation.json").read_text())
    assert results["step"] == 12
    assert results["val/loss"] == pytest.approx(curves["val/loss"][1][-1])

    # Bits per byte again, from the checkpoint at that step, in one pass over all tokens.
    export(trained, tmp_path / "model")
    assert curves["val/bits_per_byte"][1][-1] == pytest.approx(
        validation_bits_per_byte(tmp_path / "model", data), rel=1e-5
    )


def validation_bits_per_byte(model_dir, data):
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


def test_gradients_are_clipped(run):
    """With a clip of almost nothing AdamW's eps dominates, and the weights stay put."""
    clip = "--trainer.gradient_clip_val=1e-12", "--model.optimizer.weight_decay=0"
    clipped, free = run("--trainer.max_steps=3", *clip), run("--trainer.max_steps=3", folder="free")
    weights, free_weights = (
        last_checkpoint(run)["state_dict"]["model.embedding.weight"] for run in (clipped, free)
    )
    assert (weights - free_weights).abs().max() > 1e-3
    assert min(report.read_curves(clipped)["train/grad_norm"][1]) > 1e-3  # before clipping


def test_accumulated_micro_batches_are_one_step(run, capsys):
    """Without a terminal, progress is a line for each logged step."""
    whole = run("--trainer.max_steps=4", "--data.micro_batch_size=4")
    more = "--trainer.accumulate_grad_batches=2", "--trainer.log_every_n_steps=2"
    capsys.readouterr()
    accumulated = run("--trainer.max_steps=4", *more, folder="accumulated")
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in shown] == ["2/4", "4/4"]
    speed = r"loss \d\.\d{3}  [\d,]+ tokens/s  [\d.]+ steps/s  0:00:\d\d left$"
    assert re.search(speed, shown[0])
    assert shown[-1].endswith("0:00:00 left")
    means = {step: (losses(whole)[step - 1] + losses(whole)[step]) / 2 for step in (2, 4)}
    assert losses(accumulated) == pytest.approx(means, abs=1e-4)
    a, b = last_checkpoint(whole), last_checkpoint(accumulated)
    for name, weight in a["state_dict"].items():
        torch.testing.assert_close(weight, b["state_dict"][name], rtol=0, atol=2e-5)
    assert a["TokenData"]["position"] == b["TokenData"]["position"] == 16


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.config.num_layer=3", "did you mean 'model.config.num_layers'?"),
        ("--log_samples=true", "did you mean 'log-samples'?"),
        ("--qqqq=1", "--qqqq=1: --help lists all names"),
        ("--trainer.max_step=3", "did you mean 'trainer.max_steps'?"),
        ("--model.config.vocab_size=9999", "vocab_size=9999, but the token shards .* 300 tokens"),
        ("--data.dir=/nowhere", "/nowhere: no index.json"),
        ("--trainer.max_epochs=3", "trainer.max_epochs is chosen by stu-train"),
        ("--trainer.limit_train_batches=3", "trainer.limit_train_batches is chosen by stu-train"),
        ("--trainer.limit_val_batches=0.01", "limit_val_batches=0.01 .* at least 1 of the"),
        ("--trainer.logger=false", "trainer.logger is chosen by stu-train"),
        ("--resume=/nowhere.ckpt", "checkpoint /nowhere.ckpt: no such folder"),
        ("--optimizer=SGD", "unrecognized arguments"),
        ("--trainer.max_time=00:01", "not a valid duration"),
        ("--resume=last", "no checkpoints/last.ckpt"),
        ("--config=/nowhere.yaml", "/nowhere.yaml"),
    ],
)
def test_mistakes_are_one_clear_error_and_leave_nothing(run, tmp_path, capsys, argument, message):
    run("--trainer.max_steps=2", argument, code=2)
    error = capsys.readouterr().err
    assert re.search(r"stu-train: error: [\s\S]*" + message, error)
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_unknown_key_in_a_file(run, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("model:\n  config:\n    widht: 3\n")
    run("--config", tmp_path / "bad.yaml", code=2)
    assert "did you mean 'model.config.width'?" in capsys.readouterr().err


def test_run_is_not_overwritten(train, trained, capsys):
    training = trained / "checkpoints" / "last.ckpt" / "training.pt"
    before = training.read_bytes()
    train(trained, "--trainer.max_steps=13", code=2)
    assert "continue it with --resume last" in capsys.readouterr().err
    assert training.read_bytes() == before


def test_short_help_names_real_settings(capsys):
    assert cli.main(["--help"]) == 0
    short = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--help-all"])
    full = capsys.readouterr().out
    assert short.splitlines()[0] == full.splitlines()[0]
    for name in set(cli.COMMON_SETTINGS) - {"--help-all"}:
        assert name in short
        assert re.search(rf"{re.escape(name)}\b", full), name
    assert options_with_underscores(full) == set()
    assert "<class" not in full
    undescribed = r"^  (-\S+(?: \S+)*)\n +\((?:type|required)"
    assert re.findall(undescribed, full, re.MULTILINE) == []


@pytest.mark.parametrize(
    "precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow)]
)
def test_sixteen_bit_training(run, trained, precision):
    """Clipping included; the filters stay float32, and validation sums do not round."""
    same = "--trainer.max_steps=12", "--model.optimizer.warmup_steps=2"
    half = run(*same, f"--trainer.precision={precision}")
    weights = last_checkpoint(half)["state_dict"]
    assert weights["model.filters"].dtype == torch.float32
    curves, single = report.read_curves(half), report.read_curves(trained)
    for name in ("val/loss", "val/bits_per_byte"):
        assert curves[name][1] == pytest.approx(single[name][1], rel=0.02)


@pytest.mark.slow
def test_terminated_run_does_not_look_finished(settings, tmp_path):
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


def test_fault_of_the_program_has_its_own_code_and_names_rank_and_host(run, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(FlashSTUModule, "training_step", fail)
    run("--trainer.max_steps=1", code=3)
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert f"a fault of the program, on rank 0 on {socket.gethostname()}" in shown


@pytest.mark.parametrize(
    ("variables", "where"),
    [
        ({}, ""),
        ({"LOCAL_RANK": "1"}, "rank 1"),  # Lightning started it
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, "rank 5"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, "rank 3"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ""),  # it would be refused
    ],
)
def test_an_error_of_the_system_names_the_rank_and_host(variables, where, monkeypatch, capsys):
    def fail(_):
        raise OSError(28, "No space left on device", "shard")

    monkeypatch.setattr("train.run.run", fail)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["--data.dir=data"]) == 2
    named = f", on {where} on {socket.gethostname()}" if where else ""
    error = "stu-train: error: [Errno 28] No space left on device: 'shard'"
    assert capsys.readouterr().err == f"{error}{named}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), 3),
        (OSError(errno.EIO, "Input/output error"), 3),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), 3),
        (OSError(getattr(errno, "EREMOTEIO", errno.EIO), "Remote I/O error"), 3),
        (ConnectionResetError("reset"), 3),
        (OSError(errno.EHOSTUNREACH, "No route to host"), 3),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), 3),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (FileNotFoundError(errno.ENOENT, "No such file"), 2),
        (UserError("data.dir", "x", "a folder"), 2),
        (_not_written(Path("x"), 0, OSError(errno.ESTALE, "Stale file handle")), 3),
        (_not_written(Path("x"), 0, OSError(errno.ENOSPC, "No space left on device")), 2),
    ],
)
def test_a_job_is_requeued_after_errors_that_may_pass(error, code, monkeypatch):
    """slurm/train.sbatch requeues after any code but 2."""

    def fail(_):
        raise error from error.__cause__

    monkeypatch.setattr("train.run.run", fail)
    assert cli.main(["--data.dir=data"]) == code
