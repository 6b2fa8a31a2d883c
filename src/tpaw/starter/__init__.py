"""The starter: a small task, an SFT model that still makes mistakes, and data for a CPU run."""
