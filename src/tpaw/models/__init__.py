"""A player on disk and in memory."""
