"""Continuous batching: the engine, its scheduler and its model runner."""
