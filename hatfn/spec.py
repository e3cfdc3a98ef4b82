"""What build() fixed."""
