"""``hatfn bench``: time and memory of several ways to do the same work."""
