"""A training step of a whole model: contestants, batches, timed cells, the search, growth."""
