"""Chat templates, which write conversations as text."""
