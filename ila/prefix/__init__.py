"""Prefix: compute the frozen blocks below the lowest open layer once, and keep the result."""
