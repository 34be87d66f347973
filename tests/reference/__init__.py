"""Slow, obvious implementations, written straight from the formulas, to compare with."""
