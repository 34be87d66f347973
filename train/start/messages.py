"""The messages of libraries that users of `stu-train` see."""

import logging
import sys
import warnings

from lightning.pytorch.utilities import rank_zero_only

IGNORED_WARNINGS = (
    ".*isinstance.treespec, LeafSpec.",
    "The `srun` command is available",
    ".*is deprecated. Please use `torch.distributed",
    ".*all_gather is deprecated, use torch.distributed",
)


class ToStderr(logging.Handler):
    """Handler that writes messages as the command writes its own."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)


def choose_messages() -> None:
    """Show what the model's code reports, on the first rank, and no hints of Lightning, which are
    not for the users of this command."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    of_model = logging.getLogger("stu")
    if rank_zero_only.rank == 0 and not of_model.handlers:  # type: ignore[attr-defined]
        of_model.setLevel(logging.INFO)
        of_model.addHandler(ToStderr())
