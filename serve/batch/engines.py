"""Engines that decode the rows of a batch: on this machine, or on the hosts of a cluster."""

from collections.abc import Collection, Generator
from typing import Any, Protocol

from serve.batch.decoder import Report
from serve.batch.job import BatchJob


class Engines(Protocol):
    """Engines, and the rows for them.

    They are made of a configuration and the part of its rows that this run decodes, and raise
    UserError if the model, the input or a setting cannot be used.
    """

    job: BatchJob
    """Rows of the run, and their format."""
    decisive: dict[str, Any]
    """Everything except the input that determines the rows, when the run began."""

    def reports(self, done: Collection[int]) -> Generator[list[tuple[int, Report]], None, None]:
        """Decode the rows whose numbers are not in `done`.

        Yields lists of reports, each with the number of its engine. Raises UserError or OSError if
        some rows cannot be decoded by any engine; those reported before are done.
        """

    def check_input(self) -> None:
        """Raise UserError if the input has changed since the run began."""
