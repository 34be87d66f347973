"""Kinds of sequences, of which a batch has the tokens, and how tokens see one another in each."""
