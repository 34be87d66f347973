"""Prepare data, train and export Flash-STU models (Lightning and DeepSpeed)."""

import os

import platformdirs

# Lightning imports matplotlib, which would make a folder in the user's configuration.
os.environ.setdefault("MPLCONFIGDIR", str(platformdirs.user_cache_path("stu") / "matplotlib"))
