"""Search: learn a mask by stage 1, stage 2 and a method of scoring."""
