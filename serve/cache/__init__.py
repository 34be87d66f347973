"""Decoding caches in pages."""
