"""The start of a run: ranks agree, and one job owns the run folder."""
