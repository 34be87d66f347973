"""What a run has saved."""

from train.checkpoint.folder_io import FolderIO
from train.checkpoint.writer import CheckpointWriter


def load_checkpoint(path):
    """All of a checkpoint, as Lightning has it."""
    return FolderIO(CheckpointWriter()).load_checkpoint(path)
