"""OpenAI's responses: bodies, their items, the answer and its events, and a store of both."""
