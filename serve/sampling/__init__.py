"""From logits to text: sampling, grammars, detokenization."""
