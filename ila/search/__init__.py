"""Learn a mask: stage 1, stage 2, the methods."""
