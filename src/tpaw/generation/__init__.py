"""Answering prompts: backends behind one method, and the responses they leave on disk."""
