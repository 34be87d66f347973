"""The interface of a logger."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from lightning.pytorch.loggers import Logger


class RunLogger(Logger, ABC):
    """Interface of a logger. Only the first rank has any."""

    def start(self, settings: Mapping[str, str]) -> None:
        """Begin to log a run, or continue after a resume.

        settings: settings of the run by their dotted names; a logger without a place for them
        ignores them. Raises UserError if there is nowhere to log to.
        """

    def add_text(self, name: str, text: str, step: int) -> None:
        """Log a text in Markdown; a logger without support for texts ignores it."""

    @abstractmethod
    def sync(self) -> None:
        """Write to disk what was logged, so that a crash cannot leave the log behind a checkpoint.

        Raises OSError.
        """


def log_texts(loggers: list[RunLogger], tag: str, texts: list[str], step: int) -> None:
    """Log texts as `TAG/0`, `TAG/1` and so on."""
    for number, text in enumerate(texts):
        for logger in loggers:
            logger.add_text(f"{tag.rstrip('/')}/{number}", text, step)
