"""Documents in rows: where they begin, and how they are packed."""
