"""Calls of tools: which ones an answer may have, and how prompts and answers write them."""
