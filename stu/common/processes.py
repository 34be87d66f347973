"""How many processors there are for this process."""

import os
import sys


def num_processors() -> int:
    """Those that this process may use: a job may own fewer than the machine has."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
