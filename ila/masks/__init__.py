"""Which layers matter and which are open: plain data, no torch."""
