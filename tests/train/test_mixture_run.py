"""A run on a mixture: metrics of each source, and a resume in the middle of an epoch."""

import json
import random
import re
import signal
from pathlib import Path

import pytest
import yaml

from tests import forked
from tests.train.conftest import WORDS, parallel
from tests.train.saved import assert_same_state, last_checkpoint
from train import report
from train.callbacks.progress import StepProgress
from train.data import cli as prepare
from train.data.loader import TokenData
from train.health.node import facts_of_node
from train.plan import cli as plan


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Sources of about 100 and 20 samples, and one that only validates."""
    folder = tmp_path_factory.mktemp("mixture")
    source = random.Random(0)
    rows = []
    for name, count, weight, fraction in [
        ("large", 40, 3, 0.2),
        ("small", 9, 1, 0.3),
        ("held_out", 5, 0, 1),
    ]:
        lines = [" ".join(source.choices(WORDS, k=30)) for _ in range(count)]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        row = {"name": name, "path": str(path), "weight": weight, "validation_fraction": fraction}
        rows.append(row)
    (folder / "sources.yaml").write_text(yaml.safe_dump(rows))
    arguments = [str(folder / "sources.yaml"), f"--output={folder / 'data'}", "--workers=1"]
    assert prepare.main([*arguments, "--vocab-size=300"]) == 0
    return folder / "data"


def signal_at(step):
    """Return a hook that sends SIGUSR1 after a step."""

    def hook(self, trainer, *_):
        if trainer.global_step == step:
            signal.raise_signal(signal.SIGUSR1)

    return hook


CURRICULUM = "--data.curriculum=[{until_step: 4, weights: {small: 1}}]"


def samples(run):
    """Return the samples of each step of all ranks; for one that was repeated, the last ones."""
    steps = {}
    for path in sorted((run / "samples").iterdir()):
        rows = [[*map(int, row.split())] for row in path.read_text().splitlines()]
        for step, numbers in {step: numbers for step, *numbers in rows}.items():
            steps.setdefault(step, []).extend(numbers)
    return steps


def test_each_source_is_measured_and_a_resume_is_exact(
    train, mixture, tmp_path, monkeypatch, capsys
):
    """The resume is in the middle of an epoch of the smallest source, in another phase."""
    more = f"--data.dir={mixture}", CURRICULUM, "--log-samples=true", "--trainer.max_steps=10"
    whole = train(tmp_path / "whole", *more)
    printed = capsys.readouterr().err
    data = TokenData(str(mixture), 16, 2, curriculum=[{"until_step": 4, "weights": {"small": 1}}])
    size, epochs = data.num_samples("small"), data.epochs(20, 2)
    read = round(epochs["small"] * size)
    assert 10 <= read <= 12  # 8 in the first 4 steps, then a quarter
    expected = f"small: {read / 20:.2%} of the samples, {16 * size:,} tokens read {read / size:.2f}"
    assert expected in printed
    assert f"\nsmall: read {read / size:.2f} times" in printed

    curves = report.read_curves(whole)
    for name, count in epochs.items():
        assert curves[f"epochs/{name}"][1][-1] == pytest.approx(count)
    losses = {name: curves[f"val_loss/{name}"][1][-1] for name in ("large", "small", "held_out")}
    assert len({*losses.values()}) == 3
    mean = 0.75 * losses["large"] + 0.25 * losses["small"]
    assert curves["val/loss"][1][-1] == pytest.approx(mean)
    results = json.loads((whole / "validation.json").read_text())
    for name, loss in losses.items():
        assert results[f"val_loss/{name}"] == pytest.approx(loss)
        assert f"val_bits_per_byte/{name}" in results

    assert round(data.epochs(14, 2)["small"] * size) % size > 0
    with monkeypatch.context() as stopping:
        stopping.setattr(StepProgress, "on_train_batch_end", signal_at(7))
        parts = train(tmp_path / "parts", *more, code=75)
    train(parts, *more, "--resume=last")
    assert_same_state(last_checkpoint(parts), last_checkpoint(whole))
    assert samples(parts) == samples(whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 3])
def test_two_ranks_read_and_measure_the_same(train, settings, mixture, tmp_path, stage):
    more = f"--data.dir={mixture}", "--log-samples=true", "--trainer.max_steps=6"
    one = train(tmp_path / "one", *more)
    run = [f"--{name}={value}" for name, value in parallel(stage).items()]
    run += [f"--run-dir={tmp_path / 'two'}", "--trainer.devices=2", "--data.micro_batch_size=1"]
    command = [forked.program("stu-train"), *settings, *more, *run]
    done = forked.run(*command, PYTHONPATH=str(Path.cwd()))
    assert done.returncode == 0, done.stderr[-3000:]
    assert samples(tmp_path / "two") == samples(one)
    results = [
        json.loads((tmp_path / name / "validation.json").read_text()) for name in ("one", "two")
    ]
    assert "val_loss/small" in results[0]
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_plan_and_health_know_mixtures(settings, mixture, capsys):
    arguments = [*settings, f"--data.dir={mixture}", "--trainer.max_steps=10", "--gpus=1"]
    assert plan.main(["--gpu=h100-80g", *arguments]) == 0
    assert "large: 75.00% of the samples" in capsys.readouterr().out
    names = [name for name in facts_of_node(mixture) if name.startswith("the hash of")]
    assert [name.rpartition("mixture")[0] == "" for name in names] == [False] * 4
    assert sum("index.json" in name for name in names) == 3


@pytest.mark.slow
def test_weights_may_be_changed_by_name_at_a_resume(train, mixture, tmp_path, capsys):
    more = f"--data.dir={mixture}", "--trainer.max_steps=3"
    run = train(tmp_path / "run", *more)
    again = f"--data.dir={mixture}", "--trainer.max_steps=6", "--resume=last"
    changed = "--data.weights={small: 1}"
    train(run, *again, changed, code=2)
    assert re.search(r"data\.weights is .*--allow-change data\.weights", capsys.readouterr().err)
    train(run, *again, changed, "--allow-change=data.weights")
    state = last_checkpoint(run)["TokenData"]
    assert state["phases"] == [[0, {"large": 0.75, "small": 0.25}], [6, {"small": 1.0}]]
