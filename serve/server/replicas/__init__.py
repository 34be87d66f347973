"""Replicas of the engine, each in its own process."""
