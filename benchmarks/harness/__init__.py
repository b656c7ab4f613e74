"""What every benchmark stands on: gates, interleaved timing, a check for a busy machine, results."""
