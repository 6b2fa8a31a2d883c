"""Step 2: prompts become responses. Generation backends, and the responses on disk."""
