"""What a run has saved."""

from train.checkpoint_writer import CheckpointWriter
from train.checkpoints import FolderIO


def load_checkpoint(path):
    """All of a checkpoint, as Lightning has it."""
    return FolderIO(CheckpointWriter()).load_checkpoint(path)
