"""What a set of layers costs, and the best set for a budget."""
