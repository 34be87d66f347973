"""Code that all three packages share: command lines, files, processes."""
