"""Memory and time of a training run, computed without a device."""
