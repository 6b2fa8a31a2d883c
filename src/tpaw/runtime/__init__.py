"""How work is carried out: progress and interruption."""
