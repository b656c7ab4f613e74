"""Masks and runs as tables and pictures."""
