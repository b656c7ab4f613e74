"""One linear layer: contestants, their shapes, the truth they are held to, and a timed cell."""
