"""What the boundary refuses, and what it warns of."""
