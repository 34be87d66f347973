"""Operating a server that runs: traces of its requests, and another version of the model."""
