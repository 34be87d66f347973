"""Benchmarks behind the figures of README.md and docs/.

`python -m benchmarks NAME` prints JSON; every ratio comes from a single run.
"""
