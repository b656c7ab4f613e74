"""Basics of every run: whole files, an owned folder, processes, checkpoints, time and memory."""
