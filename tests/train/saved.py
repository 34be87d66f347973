"""What a run has saved."""

from train.checkpoints import FolderIO


def load_checkpoint(path):
    """All of a checkpoint, as Lightning has it."""
    return FolderIO().load_checkpoint(path)
