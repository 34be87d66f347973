"""Checks of the nodes of a SLURM job before it trains."""
