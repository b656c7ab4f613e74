"""``transformers.Trainer`` as this library uses it; train the open layers and measure the run."""
