"""OpenAI's text and chat completions: bodies of requests and of answers."""
