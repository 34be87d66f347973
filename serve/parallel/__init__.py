"""Tensor parallelism: one engine on several devices, which have a part of the model each."""
