"""Engines of a server, each in a process of its own."""
