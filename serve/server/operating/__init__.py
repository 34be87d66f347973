"""Operating a server that runs: log, metrics, traces, and another version of a model."""
