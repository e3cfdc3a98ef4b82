"""``hatfn bench``: what each way of doing the same work costs."""
