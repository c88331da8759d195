"""Data that comes with the package: a small trained language model, whose heads are real queries, keys and values."""
