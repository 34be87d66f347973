"""Training checkpoints, and model directories made from and into them."""
