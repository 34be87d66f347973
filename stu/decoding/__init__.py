"""Memory of sequences while they are decoded, by formula."""
