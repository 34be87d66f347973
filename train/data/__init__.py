"""Token shards: prepare them from text, and read them for training."""
