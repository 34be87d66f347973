"""Folders for Hugging Face's transformers: the code that reads them, and their files."""
