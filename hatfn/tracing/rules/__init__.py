"""What each operator does to labels."""
