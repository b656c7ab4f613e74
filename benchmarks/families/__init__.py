"""Families of causal language models: tiny ones are tried, and a page says what each takes."""
