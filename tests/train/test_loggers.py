"""Loggers by name."""

import csv
import errno
import json
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from stu.common.errors import UserError
from tests.serve.server_process import eventually
from tests.train.saved import losses
from train.loggers import LOGGERS, check_loggers
from train.loggers.trackers import MLflow, WeightsAndBiases


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


@pytest.mark.parametrize(
    ("logger", "method"),
    [
        ("tensorboard", "torch.utils.tensorboard.SummaryWriter.flush"),
        ("csv", "lightning.fabric.loggers.csv_logs._ExperimentWriter.save"),
    ],
)
def test_logs_that_cannot_be_written_do_not_end_a_run(train, tmp_path, monkeypatch, logger, method):
    def write_to_full_disk(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    (run / "samples" / "rank-00000.txt").symlink_to("/dev/full")
    monkeypatch.setattr(method, write_to_full_disk)
    with pytest.warns(UserWarning, match="could not be written") as found:
        train(run, f"--logger=[{logger}]", "--log-samples=true", "--trainer.max_steps=1")
    messages = " ".join(str(warning.message) for warning in found)
    assert "an entry of the log could not be written ([Errno 28]" in messages
    assert "the numbers of samples could not be written ([Errno 28]" in messages
    assert (run / "checkpoints" / "last.ckpt").exists()


def test_unknown_or_repeated_logger_is_refused():
    check_loggers(list(LOGGERS))
    for names in (["paper"], ["csv", "csv"]):
        with pytest.raises(UserError, match="list of different names of tensorboard, csv"):
            check_loggers(names)


@pytest.fixture
def trackers(monkeypatch):
    """Let trackers log into the folder of the run, and nowhere else."""
    for name in ("WANDB_PROJECT", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def wandb_records(run):
    """Return the ids of the runs in W&B's files, their last settings, and the metrics by step."""
    from wandb.proto.wandb_internal_pb2 import Record

    def values(items):
        names = ("/".join(item.nested_key) or item.key for item in items)
        return dict(zip(names, (json.loads(item.value_json) for item in items), strict=True))

    ids, settings, metrics = set(), {}, {}
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(file.read_bytes()):
            record = Record.FromString(data)
            if record.run.run_id:
                ids.add(record.run.run_id)
            settings |= values(record.run.config.update) | values(record.config.update)
            found = values(record.history.item)
            if "trainer/global_step" in found:
                metrics.setdefault(found["trainer/global_step"], {}).update(found)
    return ids, settings, metrics


def leveldb_records(log):
    """Yield the records of a log as LevelDB writes them, in blocks of 32 KiB; W&B's begin with a
    header of 7 bytes."""
    place, record = 7, b""
    while place < len(log):
        left = 32768 - place % 32768
        if left < 7:  # too few for the header of a part
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", log[place : place + 7])
        record += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


@pytest.mark.slow
@pytest.mark.usefixtures("trackers")
def test_wandb_continues_its_run(tmp_path):
    run = tmp_path / "mine"
    run.mkdir()
    for first_step, rate in ((1, "0.1"), (3, "0.2")):
        logger = WeightsAndBiases(run, first_step)
        logger.start({"model.optimizer.learning_rate": rate})
        for step in (first_step, first_step + 1):
            logger.log_metrics({"train/loss": 10.0 - step}, step)
        logger.add_text("sample/0", "a *text*", step)
        logger.sync()
        logger.finalize("success")
    # W&B's process writes the last entries when its run has finished here.
    eventually(lambda: "sample/0" in wandb_records(run)[2].get(4, {}))
    ids, settings, metrics = wandb_records(run)
    assert ids == {(run / "wandb" / "run-id").read_text()}
    assert settings["model.optimizer.learning_rate"] == "0.2"
    assert {step: found["train/loss"] for step, found in metrics.items()} == {
        step: 10.0 - step for step in (1, 2, 3, 4)
    }
    assert metrics[4]["sample/0"] == "a *text*"


@pytest.mark.usefixtures("trackers")
def test_wandb_without_a_key_is_a_user_error(tmp_path, monkeypatch):
    import wandb

    def init(**_):  # as it does with WANDB_MODE=online
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"wandb login.*WANDB_MODE=offline"):
        WeightsAndBiases(tmp_path, 1).start({})


class ClientOfServer:
    """Client of an MLflow server that goes away; its one run has a setting that never changes."""

    def __init__(self):
        self.tags, self.is_away = {}, False

    def get_run(self, run_id):
        params = {"rate": "0.1", "same": "x"}
        return SimpleNamespace(data=SimpleNamespace(params=params, tags=dict(self.tags)))

    def set_tag(self, run_id, name, value):
        self.tags[name] = value

    def log_batch(self, *_, **others):
        if self.is_away:
            raise MlflowException("no server")

    update_run = set_terminated = log_text = log_batch


class MlflowException(Exception):
    """Stands for MLflow's own."""


@pytest.fixture
def mlflow_client(monkeypatch):
    client = ClientOfServer()
    monkeypatch.setattr(MLflow, "experiment", client)
    monkeypatch.setattr(MLflow, "run_id", "mine")
    return client


@pytest.fixture
def mlflow_logger(mlflow_client, tmp_path):
    """A logger without MLflow, which takes seconds to import."""
    logger = MLflow.__new__(MLflow)
    logger._errors, logger._is_incomplete = MlflowException, False
    logger._tracking_uri, logger._id_file = "http://server", tmp_path / "id"
    logger._initialized, logger._prefix, logger._checkpoint_callback = True, "", None
    return logger


def test_mlflow_has_changed_settings_as_tags(mlflow_client, mlflow_logger):
    for rate, tags in (("0.1", {}), ("0.2", {"rate": "0.2"}), ("0.1", {"rate": "0.1"})):
        mlflow_logger.start({"rate": rate, "same": "x"})
        assert mlflow_client.tags == tags


@pytest.mark.filterwarnings("error")
def test_mlflow_that_goes_away_is_a_warning(mlflow_client, mlflow_logger):
    mlflow_client.is_away = True
    with pytest.warns(UserWarning, match="http://server does not take an entry"):
        mlflow_logger.add_text("sample/0", "text", 1)
    mlflow_logger.add_text("sample/0", "text", 2)
    mlflow_logger.finalize("success")
    with pytest.raises(UserError, match="does not take the run"):
        mlflow_logger.start({"rate": "0.1", "same": "x"})


@pytest.mark.slow
@pytest.mark.usefixtures("trackers", "ordered_event_files")
def test_trackers_have_the_metrics_of_a_resumed_run(train, tmp_path):
    run, loggers = tmp_path / "mine", "--logger=[tensorboard, wandb, mlflow]"
    train(run, loggers, "--trainer.max_steps=2")
    train(run, loggers, "--trainer.max_steps=4", "--resume=last")
    logged = losses(run)
    assert list(logged) == [1, 2, 3, 4]
    eventually(lambda: 4 in wandb_records(run)[2])
    ids, settings, metrics = wandb_records(run)
    assert len(ids) == 1
    assert settings["trainer.max_steps"] == "4"
    in_wandb = {
        step: found["train/loss"] for step, found in metrics.items() if "train/loss" in found
    }
    assert in_wandb == pytest.approx(logged)
    logger = MLflow(run, 5)
    client, (found,) = logger.experiment, logger.experiment.search_runs([logger.experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert {entry.step: entry.value for entry in history} == pytest.approx(logged)
    assert found.data.params["trainer.max_steps"] == "2", "parameters of MLflow never change"
    assert (found.info.status, found.data.tags["mlflow.runName"]) == ("FINISHED", "mine")
    text = client.download_artifacts(found.info.run_id, "sample/0/step-4.md", str(tmp_path))
    assert Path(text).read_text()
