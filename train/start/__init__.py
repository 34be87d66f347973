"""The start of a run: ranks agree on it, and one job owns the run's folder."""
