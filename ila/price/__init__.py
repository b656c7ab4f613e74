"""Prices: the cost of a set of layers, and the best set for a budget."""
