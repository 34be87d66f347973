"""Who may send requests, and how many: API keys, their rate limits and what they have used."""
