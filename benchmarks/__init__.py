"""Benchmarks behind the figures of README.md and docs/. Every ratio comes from a single run."""
