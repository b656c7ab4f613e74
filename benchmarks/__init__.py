"""Benchmarks: correctness first, then figures; results are JSON under ``results/``."""
