"""Loggers by name."""

import csv

import pytest

from stu.common.errors import UserError
from tests.train.saved import losses
from train.loggers import LOGGERS, check_loggers


@pytest.mark.usefixtures("ordered_event_files")
def test_every_logger_has_the_metrics_and_a_resume_continues_them(train, tmp_path):
    run, loggers = tmp_path / "run", "--logger=[csv, tensorboard]"
    train(run, loggers, "--trainer.max_steps=2")
    train(run, loggers, "--trainer.max_steps=4", "--resume=last")
    logged = losses(run)
    assert list(logged) == [1, 2, 3, 4]
    for version, steps in ((0, (1, 2)), (1, (3, 4))):
        with (run / "csv" / f"version_{version}" / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["train/loss"]]
        found = {int(row["step"]): float(row["train/loss"]) for row in rows}
        assert found == pytest.approx({step: logged[step] for step in steps})


def test_unknown_or_repeated_logger_is_refused():
    check_loggers(list(LOGGERS))
    for names in (["paper"], ["csv", "csv"]):
        with pytest.raises(UserError, match="list of different names of tensorboard, csv"):
            check_loggers(names)
