"""``hatfn run``: one run, its folder and its report."""
