"""A person's prompts, answered by one or two checkpoints."""
