"""What every benchmark stands on: gates, interleaved timing, busy machines, result files."""
