"""Sequences that are divided into slices, one for each rank, and what ranks exchange for them."""
