"""Operating a server that runs: traces of its requests."""
