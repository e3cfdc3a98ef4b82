"""A module that is called with other numbers than its own."""
