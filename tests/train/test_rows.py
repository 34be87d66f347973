"""Runs whose documents are kept apart and packed."""

import pytest
import torch

from tests.train.saved import assert_same_state, checkpoint, load_checkpoint, losses
from train import report
from train.data import loader
from train.data.mixture import open_sources

APART = "--data.documents=apart", "--data.packing=best_fit", "--data.seq_len=24"
LONG = "--trainer.max_steps=6", "--checkpoint-every-steps=3"


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("apart") / "run", *APART, *LONG)


def test_a_resumed_run_reads_and_computes_the_same(train, run, tmp_path):
    resumed = train(tmp_path / "run", *APART, *LONG, f"--resume={checkpoint(run, 3)}")
    ends = (load_checkpoint(checkpoint(folder, 6)) for folder in (resumed, run))
    assert_same_state(*ends)
    assert losses(resumed) == {step: loss for step, loss in losses(run).items() if step > 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["checkpoint_activations", "compile", "checkpoint_activations,compile"]
)
def test_blocks_may_be_recomputed_and_compiled(train, run, tmp_path, name):
    more = [f"--parallel.{part}=true" for part in name.split(",")]
    folder = train(tmp_path / "run", *APART, *LONG, *more)
    assert losses(folder) == pytest.approx(losses(run), rel=1e-5)


@pytest.mark.slow
def test_smaller_micro_batches_give_the_same(train, run, tmp_path):
    """Targets weigh the same, however many of a micro-batch count."""
    more = "--data.micro_batch_size=1", "--trainer.accumulate_grad_batches=2"
    folder = train(tmp_path / "run", *APART, *LONG, *more)
    for name in ("train/loss", "train/grad_norm"):
        expected, found = (report.read_curves(path)[name][1] for path in (run, folder))
        assert found == pytest.approx(expected, rel=1e-5)
    found, expected = (load_checkpoint(checkpoint(path, 6))["state_dict"] for path in (folder, run))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)


def test_settings_may_not_change_unseen(train, run, capfd, tmp_path):
    path = checkpoint(run, 3)
    other = "--data.seq_len=24", "--data.packing=best_fit", f"--resume={path}"
    train(tmp_path / "run", *LONG, *other, code=2)
    assert "data.documents is 'together', but the checkpoint" in capfd.readouterr().err


def test_what_cannot_be_is_refused_before_a_run(train, capfd, tmp_path):
    more = "--parallel.context=2", "--trainer.max_steps=2"
    train(tmp_path / "run", "--data.documents=apart", *more, code=2)
    error = "parallel.context=2 is not allowed: it must be 1 with data.documents=apart"
    assert error in capfd.readouterr().err


def test_the_start_says_what_rows_do_to_documents(train, monkeypatch, capfd, tmp_path):
    opened = []

    def count(folder):
        opened.append(folder)
        return open_sources(folder)

    monkeypatch.setattr(loader, "open_sources", count)
    train(tmp_path / "run", *APART, "--trainer.max_steps=1")
    (line,) = (row for row in capfd.readouterr().err.splitlines() if "best_fit" in row)
    assert line.startswith("data.packing: cut: ")
    assert "% of the tokens follow a cut" in line
    assert len(opened) == 2, "opened to check the settings, and to train"
