"""Caches of what the layers of a model remember while they decode."""
