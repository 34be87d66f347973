"""Loggers of experiment trackers: a run there is continued after a resume.

A step that a job repeats after a resume is logged twice. Checkpoints are not uploaded. Their own
environment variables say where they log to.
"""

import os
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from stu.common.errors import UserError, requires_extra
from stu.common.files import fsync, new_file
from train.loggers.base import RunLogger

PROJECT = "stu"
"""Project of W&B, or experiment of MLflow, if their environment variables name none."""
PARAMETER_LENGTH = 250
"""Characters of a parameter of MLflow, as Lightning cuts them."""


class WeightsAndBiases(WandbLogger, RunLogger):
    """A run of Weights & Biases, named like the run's folder; its files are in `RUN_DIR/wandb`.

    `WANDB_PROJECT`, `WANDB_ENTITY`, `WANDB_API_KEY` and the rest are W&B's own; with
    `WANDB_MODE=offline` nothing is sent, and `wandb sync` uploads the files later.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        with requires_extra("loggers"):
            import wandb

        self._errors = wandb.errors.Error
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        run_id = _read_id(run_dir / "wandb" / "run-id") or uuid.uuid4().hex[:8]
        self._run_dir, name = run_dir, run_dir.resolve().name
        super().__init__(save_dir=run_dir, project=project, name=name, version=run_id)

    def start(self, settings: Mapping[str, str]) -> None:
        _write_id(self._run_dir / "wandb" / "run-id", str(self.version))
        try:
            self.experiment.config.update(dict(settings), allow_val_change=True)
        except self._errors as error:
            message = f"--logger wandb: W&B does not start ({error}): run `wandb login`, "
            message += "or set WANDB_MODE=offline"
            raise UserError("--logger", "wandb", message=message) from error

    def add_text(self, name: str, text: str, step: int) -> None:
        self.experiment.log({name: text, "trainer/global_step": step})

    def sync(self) -> None:
        # W&B's own process writes this file, and may be a few entries behind.
        for file in (self._run_dir / "wandb").glob(f"*-{self.version}/*.wandb"):
            fsync(file)

    def finalize(self, status: str) -> None:
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(status == "failed"))
            self._experiment = None  # later metrics continue the run


class MLflow(MLFlowLogger, RunLogger):
    """A run of MLflow, named like the run's folder: in the database `RUN_DIR/mlflow.db`, or where
    `MLFLOW_TRACKING_URI` says. Its experiment is `MLFLOW_EXPERIMENT_NAME`."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        with requires_extra("loggers"):
            import alembic  # noqa: F401
            import mlflow
            import sqlalchemy  # noqa: F401
        # By default a request to a server that is away takes minutes, in which no rank trains.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self._errors = mlflow.exceptions.MlflowException
        self._is_incomplete = False
        self._id_file, folder = run_dir / "mlflow-run-id", run_dir.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", str(folder / "mlflow-artifacts")
        with self._reported(uri):
            super().__init__(
                experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
                run_name=folder.name,
                tracking_uri=uri,
                artifact_location=artifacts,
                run_id=_read_id(self._id_file),
                synchronous=True,
            )

    def start(self, settings: Mapping[str, str]) -> None:
        with self._reported(self._tracking_uri):
            _write_id(self._id_file, str(self.run_id))
            found = self.experiment.get_run(self.run_id).data
            known = found.params  # which may not change
            if new := {name: settings[name] for name in settings.keys() - known}:
                self.log_hyperparams(new)
            for name in settings.keys() & known:
                value = settings[name][:PARAMETER_LENGTH]
                if value != found.tags.get(name, known[name]):
                    self.experiment.set_tag(self.run_id, name, value)
            self.experiment.update_run(self.run_id, status="RUNNING")

    @contextmanager
    def _reported(self, uri: str) -> Iterator[None]:
        """Raise UserError for what MLflow refuses in the block."""
        try:
            yield
        except self._errors as error:
            message = f"--logger mlflow: {uri} does not take the run ({error}): check "
            message += f"MLFLOW_TRACKING_URI, or remove {self._id_file} to begin another run there"
            raise UserError("--logger", "mlflow", message=message) from error

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self._warned():
            super().log_metrics(metrics, step)

    def add_text(self, name: str, text: str, step: int) -> None:
        with self._warned():
            self.experiment.log_text(self.run_id, text, f"{name}/step-{step}.md")

    def finalize(self, status: str = "success") -> None:
        with self._warned():
            super().finalize(status)

    @contextmanager
    def _warned(self) -> Iterator[None]:
        """Turn what MLflow refuses in the block into a warning, once.

        The first rank alone logs, and the others would wait for it.
        """
        try:
            yield
        except (self._errors, OSError) as error:
            if not self._is_incomplete:
                self._is_incomplete = True
                warnings.warn(
                    f"--logger mlflow: {self._tracking_uri} does not take an entry ({error}); the "
                    "run goes on, and its log there is not complete",
                    stacklevel=3,
                )

    def sync(self) -> None:
        """Nothing is left to write: each entry is committed when it is logged."""


def _read_id(file: Path) -> str | None:
    """Return the id of the run that an earlier job began, if any."""
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _write_id(file: Path, run_id: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file) as temporary:
        temporary.write_text(run_id, encoding="utf-8")
