"""OpenAI's request and response bodies."""
