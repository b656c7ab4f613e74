"""Masks: how much each layer matters, and which layers are open. Plain data, no torch."""
