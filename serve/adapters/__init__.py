"""Adapters (LoRA) beside the linear layers of a model, several of which decode in one batch."""
