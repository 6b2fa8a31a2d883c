"""Progress bars, stop signals, and isolation of process-wide settings."""
