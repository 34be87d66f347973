"""Batch decoding of files."""
