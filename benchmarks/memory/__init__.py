"""Memory of a training step at true size, counted without the hardware."""
