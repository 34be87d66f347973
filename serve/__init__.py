"""Decode Flash-STU models: offline batches and, on top, servers."""
