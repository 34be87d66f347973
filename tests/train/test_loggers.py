"""Loggers by name: a run writes to all that its settings name, and a resumed run continues them."""

import csv

import pytest

from stu.common.errors import UserError
from train import cli, report
from train.loggers import LOGGERS, check_loggers


def test_metrics_are_in_every_logger_and_a_resume_goes_on(settings, tmp_path):
    run = tmp_path / "run"
    given = [*settings, f"--run-dir={run}", "--logger=[csv, tensorboard]"]
    assert cli.main([*given, "--trainer.max_steps=2"]) == 0
    assert cli.main([*given, "--trainer.max_steps=4", "--resume=last"]) == 0
    steps, losses = report.read_curves(run)["train/loss"]
    assert steps == [1, 2, 3, 4]
    for version, numbers in ((0, (1, 2)), (1, (3, 4))):
        with (run / "csv" / f"version_{version}" / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["train/loss"]]
        assert [int(row["step"]) for row in rows] == list(numbers)
        logged = [float(row["train/loss"]) for row in rows]
        assert logged == pytest.approx([losses[number - 1] for number in numbers])


def test_an_unknown_or_doubled_logger_is_refused():
    check_loggers(list(LOGGERS))
    for names in (["paper"], ["csv", "csv"]):
        with pytest.raises(UserError, match="list of different names of tensorboard, csv"):
            check_loggers(names)
