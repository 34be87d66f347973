"""Ranks that divide sequences equal one process, beside every strategy, and continue its runs."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.train.conftest import parallel, slow
from tests.train.saved import assert_close, checkpoint, load_checkpoint, losses
from train import report

STEPS, SAVED = 6, 3
SAMPLES = 4
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}


def arguments(folder, ranks, context, stage, layout):
    """Return settings with two micro-batches a step."""
    values = {
        "trainer.devices": ranks,
        "trainer.accumulate_grad_batches": 2,
        "data.micro_batch_size": SAMPLES * context // (2 * ranks),
        "trainer.gradient_clip_val": 1.5,
        "trainer.val_check_interval": 6,
        "trainer.max_steps": STEPS,
        "checkpoint-every-steps": SAVED,
        "run-dir": folder,
        "parallel.context": context,
        "model.config.layout": layout,
        "model.optimizer.learning_rate": 1e-3 if layout == "hyena" else 1e-2,
    }
    return [f"--{name}={value}" for name, value in (values | parallel(stage)).items()]


@pytest.fixture(scope="module")
def wholes(train, tmp_path_factory):
    """Function that returns the run of a layout in one process, made when first needed."""
    made = {}

    def get(layout, *more):
        if (layout, more) not in made:
            folder = tmp_path_factory.mktemp(layout) / "run"
            made[layout, more] = train(folder, *arguments(folder, 1, 1, None, layout), *more)
        return made[layout, more]

    return get


@pytest.fixture(scope="module")
def run(settings):
    def run(folder, *run_arguments):
        command = [forked.program("stu-train"), *settings, *arguments(folder, *run_arguments[:4])]
        done = forked.run(*command, *run_arguments[4:])
        assert done.returncode == 0, done.stderr[-3000:]
        is_said = re.findall(
            r"spectral states of rank \d+; taps differ by at most \S+e-", done.stderr
        )
        assert len(is_said) == (run_arguments[1] > 1 and run_arguments[3] in ("stu", "hybrid"))
        return folder

    return run


def assert_equal_runs(folder, whole, first=1):
    """Compare the end of two runs, and what they have logged from a step on."""
    assert_close(*(load_checkpoint(checkpoint(path, STEPS)) for path in (folder, whole)))
    for name in ("train/loss", "train/grad_norm", "data/position"):
        expected = dict(zip(*report.read_curves(whole)[name], strict=True))
        expected = {step: value for step, value in expected.items() if step >= first}
        actual = dict(zip(*report.read_curves(folder)[name], strict=True))
        assert actual == pytest.approx(expected, rel=1e-5)
    found, wanted = (json.loads((path / "validation.json").read_text()) for path in (folder, whole))
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("ranks", "context", "stage", "layout"),
    [
        (2, 2, 3, "hybrid"),
        slow(4, 2, None, "hyena"),
        *(slow(2, 2, None, layout) for layout in ("stu", "hyena", "attention", "hybrid")),
        *(slow(4, 4, None, layout) for layout in ("stu", "hyena", "attention", "hybrid")),
        *(slow(4, 2, stage, "hybrid") for stage in (None, 0, 1, 2, 3, "fsdp")),
        *(slow(4, 2, stage, "hyena") for stage in (1, 3, "fsdp")),
    ],
)
def test_divided_sequences_equal_one_process(run, wholes, tmp_path, ranks, context, stage, layout):
    folder = run(tmp_path / "run", ranks, context, stage, layout)
    assert_equal_runs(folder, wholes(layout))


@pytest.mark.slow
def test_full_form_equals_one_process(run, wholes, tmp_path):
    form = "--model.config.stu_form=full"
    folder = run(tmp_path / "run", 4, 2, 2, "stu", form)
    assert_equal_runs(folder, wholes("stu", form))


@pytest.mark.slow
@pytest.mark.parametrize("recomputes", [False, True])
def test_compiled_blocks_exchange_too(run, wholes, tmp_path, recomputes):
    more = "--parallel.compile=true", f"--parallel.checkpoint_activations={str(recomputes).lower()}"
    folder = run(tmp_path / "run", 2, 2, None, "hybrid", *more)
    assert_equal_runs(folder, wholes("hybrid"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hybrid", "hyena"])
@pytest.mark.parametrize("stage", [None, 3, "fsdp"])
def test_bfloat16_exchanges_rounded_tensors(run, wholes, tmp_path, stage, layout):
    half = "--trainer.precision=bf16-mixed"
    folder = run(tmp_path / "run", 2, 2, stage, layout, half)
    assert losses(folder) == pytest.approx(losses(wholes(layout)), rel=0.02)


@pytest.mark.slow
def test_muon_takes_the_same_steps(run, wholes, tmp_path):
    more = "--model.optimizer.name=muon", "--model.optimizer.learning_rate=1e-3"
    folder = run(tmp_path / "run", 4, 2, 1, "hybrid", *more)
    assert losses(folder) == pytest.approx(losses(wholes("hybrid", *more)), rel=1e-5)


@pytest.mark.parametrize("recomputes", [True, slow(False)])
def test_run_continues_with_another_number_of_slices(run, wholes, tmp_path, recomputes):
    whole = wholes("hybrid")
    more = f"--parallel.checkpoint_activations={str(recomputes).lower()}"
    source = f"--resume={checkpoint(whole, SAVED)}"
    folder = run(tmp_path / "divided", 2, 2, None, "hybrid", source, more)
    assert_equal_runs(folder, whole, SAVED + 1)


@pytest.mark.slow
def test_divided_run_continues_whole(run, wholes, tmp_path):
    divided = run(tmp_path / "divided", 4, 4, 1, "hybrid")
    source = f"--resume={checkpoint(divided, SAVED)}"
    folder = run(tmp_path / "run", 2, 1, 3, "hybrid", source)
    assert_equal_runs(folder, wholes("hybrid"), SAVED + 1)


@pytest.mark.slow
@pytest.mark.parametrize("length", [4096, 131_072])
def test_each_rank_keeps_its_share_of_the_activations(tmp_path, length):
    """Besides these, a rank keeps the keys of a window, and tables for the states."""
    script = Path(__file__).with_name("long_sequence.py")
    found = {}
    for size in (1, 4):
        command = [forked.python(), str(script)]
        more = str(size), str(tmp_path), str(length)
        ranks = [
            forked.Popen([*command, str(rank), *more], env=ENVIRONMENT) for rank in range(size)
        ]
        assert [process.wait(1200) for process in ranks] == [0] * size
        paths = [tmp_path / f"{size}-{rank}.pt" for rank in range(size)]
        found[size] = [torch.load(path, weights_only=True) for path in paths]
    (whole,) = found[1]
    for own in found[4]:
        assert own["loss"].item() == pytest.approx(whole["loss"].item(), rel=1e-5)
        for name in whole.keys() - {"loss", "bytes"}:
            assert (own[name] - whole[name]).norm() < 1e-4 * whole[name].norm(), name
        window = 2 * 512 * 32 * 4
        tables = length // 4 // 2 * 2 * 48 * 4
        assert own["bytes"] < whole["bytes"] / 4 + window + tables + 2**20


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--parallel.context=3"], "parallel.context=3 .* a divisor of data.seq_len=16"),
        (["--parallel.context=2"], r"parallel.context=2 .* number of ranks \(1 rank\)"),
        (["--parallel.context=32"], "parallel.context=32 .* at most model.config.width=16"),
        (["--parallel.context=0"], "parallel.context=0 .* a whole number >= 1"),
    ],
)
def test_sequences_that_cannot_be_divided_are_refused(train, tmp_path, capsys, more, message):
    train(tmp_path / "run", *more, code=2)
    assert re.search(message, capsys.readouterr().err)
