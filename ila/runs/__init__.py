"""What any run needs: whole files, an owned folder, processes, checkpoints, time and memory."""
