"""Families of causal language models: which parts of this library each takes, tried on tiny ones."""
