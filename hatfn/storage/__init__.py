"""States on disk: save and load."""
