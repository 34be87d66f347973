"""What holds for all tests, whichever of two workers runs them."""

import signal

import torch

torch.set_num_threads(1)  # such small tensors are slower on more
# Workers ignore Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = ["test_train_job.py", "test_zero.py"]
"""Of minutes, in which the first mostly waits: they begin first, one on each worker."""


def pytest_collection_modifyitems(items):
    """Files of the longest first; the others keep their order."""
    items.sort(key=lambda its: LONGEST.index(its.path.name) if its.path.name in LONGEST else 2)
