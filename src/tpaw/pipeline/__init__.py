"""The stages over a run directory."""
