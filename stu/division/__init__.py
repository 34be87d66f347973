"""Division of a model's channels among ranks, which compute each token together."""
