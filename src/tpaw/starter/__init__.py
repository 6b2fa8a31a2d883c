"""The embedded starter: a task, an unfinished SFT model and their rows, for a run on a CPU."""
