"""Prepare data, train and export Flash-STU models (Lightning and DeepSpeed)."""
