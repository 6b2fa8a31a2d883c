"""What self-play can be expected to add, measured before a run is paid for."""
