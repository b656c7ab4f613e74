"""Reports: masks and runs as tables and pictures."""
