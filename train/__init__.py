"""Prepare data, train and export Flash-STU models (Lightning and DeepSpeed)."""

import os

from stu.common.files import cache_folder

# Lightning imports matplotlib, which would make a folder in the user's configuration.
os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))
