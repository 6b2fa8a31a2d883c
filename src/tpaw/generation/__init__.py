"""Prompts become responses: backends behind one method, and the responses on disk."""
