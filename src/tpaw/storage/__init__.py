"""Files on disk: artifacts, the run directory and package paths."""
