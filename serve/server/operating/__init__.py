"""What operators ask of a server that runs: traces, new keys and certificates, another model."""
