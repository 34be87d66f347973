"""Token shards: preparing them from text, and reading them for training."""
