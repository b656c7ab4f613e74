"""Held-out loss against total time: ways to train, each at its best learning rate."""
